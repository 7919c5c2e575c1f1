from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from exitsafe.cli import console
from exitsafe.cli.console import _Pace


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with console.results(as_json=True) as show:
        print("a library talks")
        show({"value": 1}, lambda: pytest.fail("tables are for people"))
        print("and again")
    output = capsys.readouterr()
    assert json.loads(output.out) == {"value": 1}
    assert output.err == "a library talks\nand again\n"


def test_json_refuses_what_json_has_not() -> None:
    with console.results(as_json=True) as show, pytest.raises(ValueError, match="JSON"):
        show({"value": float("nan")}, list)


def test_people_get_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/[bold]" + "long/" * 60
    with console.results(as_json=False) as show:
        show({}, lambda: [path])
    assert capsys.readouterr().out == path + "\n"


def test_a_complaint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("a\n  b")
    assert capsys.readouterr().err == "exitsafe: a b\n"


def _clock(*times: float) -> Iterator[float]:
    return iter(times)


def test_pace_counts_from_the_first_call() -> None:
    times = _clock(100.0, 110.0, 120.0)
    pace = _Pace("answer", clock=lambda: next(times))
    assert pace.at(1000, 1300) == ""  # done by an earlier start
    assert pace.at(1100, 1300) == "10.0 answers/s, 0:20 left"
    assert pace.at(1300, 1300) == "15.0 answers/s, took 0:20"


def test_slow_work_is_told_in_seconds_each() -> None:
    times = _clock(0.0, 100.0)
    pace = _Pace("step", clock=lambda: next(times))
    pace.at(0, 80)
    assert pace.at(40, 80) == "2.5 s/step, 1:40 left"


def test_progress_without_a_terminal_is_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with console.progress_bar("Audit", unit="answer") as progress:
        for done in range(101):
            now += 0.25
            progress(done, 100, "ASR 50.0% so far")
        progress(100, 100, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Audit: 39/100, 4.0 answers/s, 0:15 left, ASR 50.0% so far",
        "Audit: 79/100, 4.0 answers/s, 0:05 left, ASR 50.0% so far",
        "Audit: 100/100, 4.0 answers/s, took 0:25, ASR 50.0% so far",
    ]
