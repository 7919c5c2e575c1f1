"""The report of two audits of 10,000 samples at 24 exits, opened in Chromium, beside an empty page of the same size.

A page is open when the list of transcripts can be used. The empty page has as many bytes, in an element that no script
reads: what remains is what the report's own contents cost. Goal: below 2 s. Needs Chromium and playwright.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from benchmarks.timing import best_seconds
from exitsafe.show.report import render_report
from tests.show.chromium import CHROMIUM, FLAGS
from tests.show.transcript_runs import write_run

NUM_SAMPLES, NUM_LAYERS, NUM_RUNS = 10_000, 24, 2
WORDS = (
    "mix",
    "moss",
    "with",
    "foam",
    "then",
    "shake",
    "it",
    "a",
    "red",
    "circle",
    "is",
    "on",
    "the",
    "left",
    "of",
    "a",
    "stone",
)


def main() -> None:
    if CHROMIUM is None:
        print("(report page) not measured: chromium is not installed")
        return
    folder = Path(tempfile.mkdtemp(prefix="exitsafe-bench-"))
    runs = []
    for number in range(NUM_RUNS):
        words = random.Random(number)
        run = write_run(
            folder / f"run {number}",
            answer=lambda *_, words=words: " ".join(words.choices(WORDS, k=words.randint(4, 40))),
            num_samples=NUM_SAMPLES,
            num_layers=NUM_LAYERS,
        )
        runs.append((f"run {number}", run))
    started = time.perf_counter()
    report = render_report(runs, out=folder / "report.html")
    built = time.perf_counter() - started
    empty = folder / "empty.html"
    empty.write_text(_empty_page(report.stat().st_size))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        seconds = best_seconds(
            {"report": lambda: open_page(browser, report), "empty page": lambda: open_page(browser, empty)}, rounds=5
        )
        browser.close()
    size = report.stat().st_size / 2**20
    shutil.rmtree(folder)
    print(
        f"(report page) {NUM_SAMPLES} samples x {NUM_LAYERS} exits x {NUM_RUNS} runs: "
        f"{size:.1f} MB, built in {built:.0f} s"
    )
    for name, value in seconds.items():
        print(f"    {name}: usable after {value:.2f} s")
    print(f"    {seconds['report'] / seconds['empty page']:.1f} times an empty page of the same size (goal: below 2 s)")


def open_page(browser: Browser, path: Path) -> None:
    """Until the first row can be pressed."""
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("#t-list button")
    page.close()


def _empty_page(num_bytes: int) -> str:
    filling = '<script type="application/json">' + "A" * num_bytes + "</script>"
    return f'<!DOCTYPE html><title>empty</title><p id="t-list"><button>x</button></p>{filling}'


if __name__ == "__main__":
    main()
