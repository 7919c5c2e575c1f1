"""The report in a real headless Chromium: opened as a file, used by mouse and by keyboard, attacked by its answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from exitsafe.report import transcripts as module
from exitsafe.report.page import _policy, render_report
from tests.report.transcript_runs import REFUSAL, UNSAFE, always_refuses, write_run

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install")
expect = playwright_api.expect
expect.set_options(timeout=20_000)  # of a busy machine; quiet ones need milliseconds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="chromium is not installed, so the page is NOT tested in a browser: apt-get install chromium",
)

SERIOUS = ("serious", "critical")
MEGABYTE = 2**20
HOSTILE = {
    "s-0000": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><svg onload='hacked = 3'>",
    "s-0001": "javascript:window.hacked=4 <a href='javascript:window.hacked=5'>here</a> <iframe src='https://example.com'>",
    "s-0002": "safe \u202e elas ton si siht \u2066\u2069 \u0000 \u200b end",
    "s-0003": "moss " + "\U0001f600x" * (MEGABYTE // 2),
    "s-0004": "</script></textarea></style>--><!-- ]]> {{ 7 * 7 }} ${window.hacked = 6}",
    "s-0005": "a" + "\u0301" * 1500 + "\nline\r\nline",
    "s-0006": "",
}


def hostile(sample: str, exit_layer: int) -> str:
    return HOSTILE.get(sample, REFUSAL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    return [
        ("before", write_run(folder / "before")),
        ("after", write_run(folder / "after", answer=always_refuses)),
    ]


@pytest.fixture(scope="module")
def report(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is passed on: without texts."""
    return render_report(runs, out=tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def hostile_report(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With texts, some of which attack; names of runs attack, too."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = [("<script>window.hacked=7</script>", write_run(folder / "run", answer=hostile)), runs[0]]
    return render_report(runs, out=folder / "report.html", include_unsafe_text=True)


def write_browser(runs: Any, path: Path, *, include_unsafe_text: bool) -> Path:
    """The transcript browser alone, under the report's policy: no charts to wait for."""
    built = module.build_transcripts(runs, out=path, include_unsafe_text=include_unsafe_text)
    policy = _policy(styles=[built.style], scripts=[built.script])
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
        context.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def _refuse(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        assert self.faults == []
        # the icon is in the page itself
        assert [url for url in self.requests if not url.startswith("data:")] == [self.url]


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
    watched = Opened(context, path)
    yield watched.page
    watched.check()
    context.close()


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


# ---- the page ----


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


# ---- the transcript browser ----


def test_filters_by_mouse(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        count(page, "384 answers of 48 samples match.")
        page.select_option("#t-kind", label="harmful")
        count(page, "96 answers of 12 samples match.")
        page.select_option("#t-run", label="before")
        count(page, "48 answers of 12 samples match.")
        page.select_option("#t-verdict-0", label="attack succeeded")
        count(page, "24 answers of 12 samples match.")
        page.select_option("#t-verdict-0", label="label: unsafe: S2")
        count(page, "6 answers of 3 samples match.")
        page.select_option("#t-layer", label="1")
        count(page, "3 answers of 3 samples match.")
        page.select_option("#t-verdict-2", label="refused")
        count(page, "No answer matches; clear a filter.")
        page.click("text=Clear all filters")
        count(page, "384 answers of 48 samples match.")
        page.select_option("#t-category", label="weapons & <b>traps</b>")
        count(page, "128 answers of 16 samples match.")
        page.select_option("#t-verdict-3", label="0.5 or more")
        count(page, "8 answers of 4 samples match.")
        page.click("text=Clear all filters")
        page.select_option("#t-verdict-0", label="not scored")
        count(page, "24 answers of 12 samples match.")
        page.select_option("#t-layer", label="3 (default)")
        count(page, "24 answers of 12 samples match.")
        page.click("text=Clear all filters")
        page.select_option("#t-verdict-4", label="partly right")
        count(page, "24 answers of 12 samples match.")
        page.fill("#t-id", "S-0007")
        count(page, "2 answers of 1 sample match.")


def test_one_sample_side_by_side(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        page.select_option("#t-run", label="before")
        page.select_option("#t-verdict-0", label="attack succeeded")
        count(page, "24 answers of 12 samples match.")
        open_first(page)
        expect(page.locator("#t-sample")).to_have_text("s-0000")
        assert is_focused(page, "t-sample")
        heads = page.locator("#t-scroll thead th").all_inner_texts()
        assert heads == ["Exit layer", "before", "after"]
        assert [text.split() for text in page.locator("#t-scroll tbody th").all_inner_texts()] == [
            ["1"], ["2"], ["3", "default"], ["4"],
        ]  # fmt: skip
        cells = page.locator("#t-scroll td").all_inner_texts()
        assert [re.findall(r"Answer (\w)", cell)[0] for cell in cells] == ["A", "B", "A", "B", "B", "B", "B", "B"]
        assert page.locator("#t-scroll td.t-match").count() == 2
        first = " ".join(cells[0].split())
        assert first.startswith("Attack success, llama-guard attack succeeded (unsafe: S2) Attack success, world-rule")
        assert "Toxicity 0.125" in first
        assert "9 tokens, 39 characters; ended by itself" in first
        assert "not scored" in cells[4]
        assert page.locator(".t-text").count() == 0
        page.check("#t-only")
        expect(page.locator("#t-scroll tbody tr")).to_have_count(2)
        page.click("#t-after")
        expect(page.locator("#t-sample")).to_have_text("s-0004")
        page.click("#t-before")
        expect(page.locator("#t-sample")).to_have_text("s-0000")
        press(page, "t-before")  # there is none before the first
        expect(page.locator("#t-sample")).to_have_text("s-0000")


def test_the_list_has_pages(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        expect(page.locator("#t-page")).to_have_text("Page 1 of 3")
        page.click("#t-on")
        page.click("#t-on")
        expect(page.locator("#t-page")).to_have_text("Page 3 of 3")
        assert page.locator("#t-list button > bdi").first.inner_text() == "s-0040"
        press(page, "t-on")
        expect(page.locator("#t-page")).to_have_text("Page 3 of 3")
        open_first(page)
        page.click("#t-back")
        expect(page.locator("#t-page")).to_have_text("Page 2 of 3")
        page.fill("#t-id", "s-000")
        expect(page.locator("#t-page")).to_have_text("Page 1 of 1")


def test_everything_by_keyboard_alone(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        tab_to(page, "t-id")
        page.keyboard.type("s-00")
        count(page, "384 answers of 48 samples match.")
        page.keyboard.press("Tab")
        assert is_focused(page, "t-kind")
        page.keyboard.press("ArrowDown")
        count(page, "96 answers of 12 samples match.")
        tab_to(page, "t-verdict-0")
        page.keyboard.type("attack s")
        count(page, "24 answers of 12 samples match.")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
        while not page.evaluate("document.activeElement.closest('#t-list') !== null"):
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert page.evaluate(outline) == "solid"
        assert page.evaluate("document.activeElement.dataset.sample") == "8"
        page.keyboard.press("Enter")
        expect(page.locator("#t-sample")).to_have_text("s-0008")
        assert is_focused(page, "t-sample")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.dataset.sample") == "8"
        assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
        page.keyboard.press("Enter")
        tab_to(page, "t-after", most=3)
        page.keyboard.press("Enter")
        expect(page.locator("#t-sample")).to_have_text("s-0012")
        tab_to(page, "t-only", most=5)
        page.keyboard.press("Space")
        expect(page.locator("#t-scroll tbody tr")).to_have_count(2)
        page.keyboard.press("Shift+Tab")
        assert is_focused(page, "t-return")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.dataset.sample") == "12"


def test_arrows_turn_the_pages_of_the_list(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        count(page, "384 answers of 48 samples match.")
        page.locator("#t-list button").first.focus()
        page.keyboard.press("ArrowUp")  # stays
        page.keyboard.press("End")
        page.keyboard.press("ArrowDown")
        expect(page.locator("#t-page")).to_have_text("Page 2 of 3")
        assert page.evaluate("document.activeElement.dataset.sample") == "20"
        page.keyboard.press("ArrowUp")
        expect(page.locator("#t-page")).to_have_text("Page 1 of 3")
        assert page.evaluate("document.activeElement.dataset.sample") == "19"


# ---- hostile answers, redaction, sidecar ----


def test_hostile_answers_do_nothing(browser: Any, hostile_report: Path) -> None:
    with opened(browser, hostile_report) as page:
        foreign = "#transcripts :is(script, img, svg, a, iframe, style, object)"
        for number in range(len(HOSTILE)):
            shown = find(page, f"s-000{number}").locator(".t-text").inner_text()
            assert page.locator(foreign).count() == 0
            if number in (0, 1, 4):
                assert shown == HOSTILE[f"s-000{number}"]
        page.wait_for_timeout(100)
        assert page.evaluate("window.hacked ?? null") is None
        assert page.locator("body > *").count() == page.evaluate("document.body.children.length")


def test_what_cannot_be_seen_is_spelt_out(browser: Any, hostile_report: Path) -> None:
    with opened(browser, hostile_report) as page:
        block = find(page, "s-0002").locator(".t-text")
        assert block.inner_text() == "safe ⟨U+202E⟩ elas ton si siht ⟨U+2066⟩⟨U+2069⟩ ⟨U+0000⟩ ⟨U+200B⟩ end"
        assert block.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"


def test_a_line_of_a_megabyte_is_cut_and_can_be_shown(browser: Any, hostile_report: Path) -> None:
    with opened(browser, hostile_report) as page:
        cell = find(page, "s-0003")
        whole = HOSTILE["s-0003"]
        short = cell.locator(".t-text").evaluate("e => e.textContent")
        assert len(short) < 2010
        assert whole.startswith(short.removesuffix("…"))
        cell.get_by_role("button", name="Show all of this answer").click()
        # JavaScript counts halves of pairs
        assert cell.locator(".t-text").evaluate("e => e.textContent.length") == len(whole.encode("utf-16-le")) // 2
        # laid out at once, a megabyte of pictograms takes many seconds
        styles = "e => [...new Set([...e.children].map((piece) => getComputedStyle(piece).contentVisibility))]"
        assert cell.locator(".t-text").evaluate(styles) == ["auto"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200
        cell.get_by_role("button", name="Show less").click()
        assert len(cell.locator(".t-text").evaluate("e => e.textContent")) < 2010


def test_halves_of_pairs_are_spelt_out(
    runs: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no Parquet file can hold one, but the page must not rely on that
    monkeypatch.setattr(module, "_texts", lambda grid: [[["a \ud83d b"] * 4] * 2] * 48)
    path = write_browser(runs, tmp_path / "report.html", include_unsafe_text=True)
    with opened(browser, path) as page:
        open_first(page)
        assert page.locator("#t-scroll td").first.locator(".t-text").inner_text() == "a ⟨U+D83D⟩ b"


def test_without_the_flag_no_answer_is_in_the_page(browser: Any, report: Path, hostile_report: Path) -> None:
    with opened(browser, report) as page:
        for row in range(5):
            page.locator("#t-list button").nth(row).click()
            expect(page.locator("#t-sample")).to_have_text(f"s-000{row}")
        assert UNSAFE.split()[1] not in page.content()
        assert REFUSAL not in page.content()
    with opened(browser, hostile_report) as page:
        find(page, "s-0010")
        assert REFUSAL in page.content()
    assert hostile_report.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("has_texts", [True, False])
def test_the_sidecar_is_opened_by_hand(
    runs: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_texts: bool
) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", 5000 if has_texts else 1000)
    path = write_browser(runs, tmp_path / "report.html", include_unsafe_text=has_texts)
    sidecar = path.with_name("report.transcripts.jsonl")
    other, short = tmp_path / "other.jsonl", tmp_path / "short.jsonl"
    own = json.loads(sidecar.read_text().splitlines()[0])["report"]
    other.write_text(sidecar.read_text().replace(own, own[::-1], 1))  # as long as the right one
    short.write_text(sidecar.read_text()[:-100])
    with opened(browser, path) as page:
        expect(page.locator("#t-sidecar")).to_contain_text(sidecar.name)
        if has_texts:
            open_first(page)
            assert page.locator(".t-text").count() == 0
            expect(page.locator("#t-scroll caption")).to_contain_text(f"open {sidecar.name} above")
        else:
            expect(page.locator("#t-browser")).to_be_hidden()
        for wrong in (other, short, path):
            page.set_input_files("#t-file", [])
            expect(page.locator("#t-fault")).to_be_empty()
            page.set_input_files("#t-file", wrong)
            expect(page.locator("#t-fault")).to_contain_text("does not belong to this page")
        page.set_input_files("#t-file", sidecar)
        expect(page.locator("#t-sidecar-state")).to_have_text("The file is open.")
        expect(page.locator("#t-fault")).to_be_empty()
        if not has_texts:
            count(page, "384 answers of 48 samples match.")
            open_first(page)
        expect(page.locator("#t-scroll table")).to_be_visible()
        blocks = page.locator(".t-text")
        expect(blocks).to_have_count(8 if has_texts else 0)
        if has_texts:
            assert blocks.first.inner_text() == f"{UNSAFE} s-0000"


def test_a_damaged_sidecar_is_told(runs: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", 5000)
    path = write_browser(runs, tmp_path / "report.html", include_unsafe_text=True)
    sidecar = path.with_name("report.transcripts.jsonl")
    head, *lines = sidecar.read_text().splitlines()
    sidecar.write_text("\n".join([head, *(re.sub(r"\w", "A", line) for line in lines), ""]))
    with opened(browser, path) as page:
        page.set_input_files("#t-file", sidecar)
        page.locator("#t-list button").first.click()
        expect(page.locator("#t-fault")).to_contain_text("That did not work")
