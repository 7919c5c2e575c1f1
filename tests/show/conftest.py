from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exitsafe.show.report import render_report
from tests.show.transcript_runs import always_refuses, hostile, write_run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Closed after each file: while it is open, its event loop is in the way of tests that run one."""
    from tests.show.chromium import CHROMIUM, FLAGS, playwright_api

    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def audits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    return [
        ("before", write_run(folder / "before")),
        ("after", write_run(folder / "after", answer=always_refuses)),
    ]


@pytest.fixture(scope="session")
def report(audits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is passed on: without texts."""
    return render_report(audits, out=tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="session")
def hostile_report(audits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With texts, some of which attack; names of runs attack, too."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = [("<script>window.hacked=7</script>", write_run(folder / "run", answer=hostile)), audits[0]]
    return render_report(runs, out=folder / "report.html", include_unsafe_text=True)
