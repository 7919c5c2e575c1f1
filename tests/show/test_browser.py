"""The report in a real headless Chromium, opened as a file: charts, policy, accessibility, print, narrow screens."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from exitsafe.show.report import render_report
from tests.show.chromium import expect, needs_chromium, open_first, opened
from tests.show.page_runs import write_run

pytestmark = needs_chromium
SERIOUS = ("serious", "critical")


def test_charts_are_there_with_a_name_and_a_table(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        expect(page.locator("#verdict h2")).to_contain_text("attack success averaged over exits fell")
        charts = page.locator("figure svg[role=img]")
        assert charts.count() >= 5
        for place in range(charts.count()):
            expect(charts.nth(place)).to_be_visible()
            assert charts.nth(place).locator("title").count() >= 1
        figures = page.locator("figure")
        assert figures.count() == page.locator("figure:has(table)").count()


def test_the_first_screen_of_a_laptop_has_verdict_numbers_and_chart(browser: Any, report: Path, tmp_path: Path) -> None:
    """Also where a proxy judge adds a caution, and for one run."""
    judges = [("refusal-prefix", ("asr", "refusal")), ("vqa", ("vqa_accuracy",))]
    runs = [(label, write_run(tmp_path / label, harmful_until=n, judges=judges)) for n, label in enumerate("ab")]
    pages = [report, render_report(runs, out=tmp_path / "two.html"), render_report(runs[:1], out=tmp_path / "one.html")]
    for path in pages:
        with opened(browser, path, viewport={"width": 1366, "height": 768}) as page:
            for what, number in (("#verdict h2", 1), (".numbers strong", 4), (".first svg[role=img]", 1)):
                boxes = [found.bounding_box() for found in page.locator(what).all()]
                assert len(boxes) >= number
                assert all(box["y"] + box["height"] <= 768 and box["x"] + box["width"] <= 1366 for box in boxes)
            order = "[...document.querySelectorAll('main > section')].map((section) => section.id)"
            assert page.evaluate(order)[:2] == ["verdict", "findings"]


def test_the_policy_lets_nothing_out_and_no_other_script_in(browser: Any, report: Path) -> None:
    heard: list[str] = []
    address = "http://127.0.0.1:9/away"

    def hear(route: Any) -> None:
        heard.append(route.request.url)
        route.abort()

    with closing(browser.new_context()) as context:
        context.route("http://**", hear)
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


@pytest.mark.parametrize(("name", "scheme", "width"), [("report", "light", 1200), ("hostile_report", "dark", 375)])
def test_axe_finds_no_serious_fault(
    browser: Any, request: pytest.FixtureRequest, name: str, scheme: str, width: int
) -> None:
    axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make install")
    # axe is injected as a script, which the page's own policy forbids
    options = {"bypass_csp": True, "color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with opened(browser, request.getfixturevalue(name), **options) as page:
        open_first(page)
        found = axe_api.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
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
