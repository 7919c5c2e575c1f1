"""A headless Chromium for tests: pages opened from disk and watched, and what a reader does with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exitsafe.show import transcripts
from exitsafe.show.html_page import security_policy

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install")
expect = playwright_api.expect
expect.set_options(timeout=20_000)  # of a busy machine; quiet ones need milliseconds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="chromium is not installed, so NO browser test ran: apt-get install chromium",
)


def write_browser(runs: Any, path: Path, *, include_unsafe_text: bool) -> Path:
    """The transcript browser alone, under the report's policy: no charts to wait for."""
    built = transcripts.build_transcripts(runs, out=path, include_unsafe_text=include_unsafe_text)
    policy = security_policy(styles=[built.style], scripts=[built.script])
    path.write_text(
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>alone</title><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{built.style}</style>'
        f'{built.html}<script type="application/json" id="transcripts-data">{built.data}</script>'
        f"<script>{built.script}</script></html>"
    )
    return path


class Opened:
    """A page, and what it did that nobody may do: errors, requests, dialogs, windows."""

    def __init__(self, context: Any, path: Path) -> None:
        self.page = context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type != "log" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", self._refuse)
        self.page.on("popup", lambda popup: self.faults.append("popup"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def _refuse(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        assert self.faults == []
        # the icon is in the page itself
        assert [url for url in self.requests if not url.startswith("data:")] == [self.url]


_CONTEXTS: dict[str, Any] = {}


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """A page that must do nothing it may not; those with the same options share a context, which is slow to make."""
    options = {"viewport": {"width": 1200, "height": 900}} | options
    context = _CONTEXTS.get(repr(options))
    if context not in browser.contexts:
        context = _CONTEXTS[repr(options)] = browser.new_context(**options)
    watched = Opened(context, path)
    yield watched.page
    watched.check()
    watched.page.close()


def count(page: Any, text: str) -> None:
    expect(page.locator("#t-count")).to_have_text(text)


def open_first(page: Any) -> None:
    page.locator("#t-list button").first.click()
    expect(page.locator("#t-scroll table")).to_be_visible()


def find(page: Any, sample: str) -> Any:
    """Search a sample, open it, and give its first answer's cell."""
    page.fill("#t-id", sample)
    expect(page.locator("#t-list button > bdi")).to_have_text([sample])
    page.locator("#t-list button").first.click()
    expect(page.locator("#t-sample")).to_have_text(sample)
    return page.locator("#t-scroll td").first


def press(page: Any, element_id: str) -> None:
    """A press on a button that says it is disabled, for which click() would wait."""
    page.locator(f"#{element_id}").focus()
    page.keyboard.press("Enter")


def is_focused(page: Any, element_id: str) -> bool:
    return bool(page.evaluate("document.activeElement.id") == element_id)


def tab_to(page: Any, element_id: str, *, most: int = 200) -> None:
    for _ in range(most):
        if is_focused(page, element_id):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{element_id} is not reached by Tab")
