from __future__ import annotations

import json
import logging
import sys
import warnings
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


def test_no_time_left_is_told_before_enough_is_known_and_the_slow_start_is_forgotten() -> None:
    times = _clock(0.0, 9.0, 40.0, 60.0, 70.0, 80.0)
    pace = _Pace("answer", clock=lambda: next(times))
    told = [pace.at(done, 1000) for done in (0, 2, 4, 200, 300, 400)]
    assert [" left" in each for each in told] == [False, False, True, True, True, True]
    assert told[-1].endswith("1:01 left")  # by the later half: 10 answers a second


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
        "Audit: 39/100, 4.0 answers/s, ASR 50.0% so far",
        "Audit: 79/100, 4.0 answers/s, 0:05 left, ASR 50.0% so far",
        "Audit: 100/100, 4.0 answers/s, took 0:25, ASR 50.0% so far",
    ]


ESC, OSC, BIDI = "\x1b[2J", "\x1b]0;owned\x07", "\u202e"
HOSTILE = f"a{ESC}{OSC}{BIDI}\x9b31m\x00\nexitsafe: every metric is the same"
NEVER = ("\x1b", "\x07", "\u202e", "\x9b", "\x00")


def test_what_a_file_says_reaches_the_terminal_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    markup = "[red]x[/red] :warning: [link=http://x.example]y[/link]"
    table = Table(title=f"{HOSTILE} {markup}", caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="bold"))
    with console.results(as_json=False) as show:
        show({}, lambda: [table, Panel(Text(HOSTILE), title=HOSTILE), HOSTILE, Text(HOSTILE)])
    console.note(HOSTILE)
    console.complain(HOSTILE)
    warnings.warn(HOSTILE, stacklevel=1)
    output = capsys.readouterr()
    for character in NEVER:
        assert character not in output.out + output.err
    assert "[red]x[/red] :warning:" in " ".join(output.out.split())
    note, complaint, warning = output.err.splitlines()  # one line each, whatever line breaks they had
    assert all(line.endswith("every metric is the same") for line in (note, complaint, warning))


def test_a_traceback_is_plain_text_and_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_traceback(f"Traceback\n  line\n{HOSTILE}")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 4
    assert not [character for character in NEVER if character in said]


def test_what_libraries_log_is_plain_text_too(capsys: pytest.CaptureFixture[str]) -> None:
    factory = logging.getLogRecordFactory()
    try:
        console.quieten_libraries()
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("another_package")
        logger.addHandler(handler)
        logger.warning("\x1b[31mmodel_type\x1b[0m is %s at https://me:zorb-key@host/x?sig=zorb-key", HOSTILE)
        logger.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(factory)
    said = capsys.readouterr().err
    assert said.startswith("model_type is a")
    assert not [character for character in NEVER if character in said]
    assert "zorb-key" not in said and "https://host/x" in said


def test_credentials_in_a_url_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("cannot reach https://me:zorb-key@host:8443/v1/models?api_key=zorb-key&x=1 (refused)")
    console.complain('proxy "http://zorb-key@proxy/": down')
    assert capsys.readouterr().err.splitlines() == [
        "cannot reach https://host:8443/v1/models (refused)",
        'exitsafe: proxy "http://proxy/": down',
    ]


def test_joiners_stay_where_scripts_need_them_and_not_where_they_fake() -> None:
    assert console.printable("می\u200cروم 👩\u200d💻 a\u200db") == "می\u200cروم 👩\u200d💻 a\ufffdb"
