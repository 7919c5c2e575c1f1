"""The report in a real headless Chromium, opened as a file: charts, policy, accessibility, print, narrow screens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.report.chromium import expect, needs_chromium, open_first, opened

pytestmark = needs_chromium
SERIOUS = ("serious", "critical")


def test_charts_are_there_with_a_name_and_a_table(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        charts = page.locator("figure svg.chart")
        assert charts.count() >= 5
        for place in range(charts.count()):
            expect(charts.nth(place)).to_be_visible()
            assert charts.nth(place).locator("title").count() >= 1
        figures = page.locator("figure")
        assert figures.count() == page.locator("figure:has(table)").count()


def test_the_policy_lets_nothing_out_and_no_other_script_in(browser: Any, report: Path) -> None:
    with listening() as (address, heard), closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(report.as_uri())
        statuses, blocked, mark = page.evaluate(
            """async ([away, own]) => {
                const seen = new Set();
                document.addEventListener("securitypolicyviolation", (event) => seen.add(event.effectiveDirective));
                const tries = await Promise.allSettled([fetch(away), fetch(own)]);
                const made = ["img", "script", "iframe"].map((tag) => document.createElement(tag));
                made.forEach((element) => { element.src = away; });
                const inline = document.createElement("script");
                inline.textContent = "window.hacked = 8";
                document.body.append(...made, inline);
                await new Promise((done) => setTimeout(done, 300));
                return [tries.map((one) => one.status), [...seen], window.hacked ?? null];
            }""",
            [address, report.as_uri()],
        )
        assert statuses == ["rejected", "rejected"]
        assert {"connect-src", "img-src", "script-src-elem", "frame-src"} <= set(blocked)
        assert mark is None
        assert heard == []


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and what it was asked for."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/away", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("name", "scheme", "width"), [("report", "light", 1200), ("hostile_report", "dark", 375)])
def test_axe_finds_no_serious_fault(
    browser: Any, request: pytest.FixtureRequest, name: str, scheme: str, width: int
) -> None:
    axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make install")
    # axe is injected as a script, which the page's own policy forbids
    options = {"bypass_csp": True, "color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with opened(browser, request.getfixturevalue(name), **options) as page:
        open_first(page)
        found = axe_api.Axe().run(page).response["violations"]
        serious = [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS]
        assert serious == []


def test_print_leaves_the_browser_out_and_says_so(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        expect(page.locator("#t-filters")).to_be_visible()
        page.emulate_media(media="print")
        expect(page.locator("#t-filters")).to_be_hidden()
        expect(page.get_by_text("left out of print")).to_be_visible()


@pytest.mark.parametrize("width", [320, 375, 768])
def test_a_narrow_page_does_not_scroll_sideways(browser: Any, hostile_report: Path, width: int) -> None:
    with opened(browser, hostile_report, viewport={"width": width, "height": 700}) as page:
        open_first(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
