"""The transcript browser in a real headless Chromium: by mouse, by keyboard, attacked by answers, with a sidecar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from exitsafe.show import transcripts as module
from tests.show.chromium import (
    count,
    expect,
    find,
    is_focused,
    needs_chromium,
    open_first,
    opened,
    press,
    tab_to,
    write_browser,
)
from tests.show.transcript_runs import HOSTILE, REFUSAL, UNSAFE

pytestmark = needs_chromium


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
        assert "9 tokens, 39 characters; ended on its own" in first
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
    audits: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no Parquet file can hold one, but the page must not rely on that
    monkeypatch.setattr(module, "_texts", lambda grid: [[["a \ud83d b"] * 4] * 2] * 48)
    path = write_browser(audits, tmp_path / "report.html", include_unsafe_text=True)
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
    audits: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_texts: bool
) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", 5000 if has_texts else 1000)
    path = write_browser(audits, tmp_path / "report.html", include_unsafe_text=has_texts)
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


def test_a_damaged_sidecar_is_told(audits: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", 5000)
    path = write_browser(audits, tmp_path / "report.html", include_unsafe_text=True)
    sidecar = path.with_name("report.transcripts.jsonl")
    head, *lines = sidecar.read_text().splitlines()
    sidecar.write_text("\n".join([head, *(re.sub(r"\w", "A", line) for line in lines), ""]))
    with opened(browser, path) as page:
        page.set_input_files("#t-file", sidecar)
        page.locator("#t-list button").first.click()
        expect(page.locator("#t-fault")).to_contain_text("Failed: ")
