from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from exitsafe.cli import gate_tables
from exitsafe.cli.main import run
from exitsafe.results.run import AuditRun
from tests.gate.gate_runs import ANSWER, rows, write_run

HOSTILE = "a|b <img src=x> `c` [d](https://e.example) www.f.example\n\x1b[31m\u202e"
JENKINS = {  # elements and attributes of junit-10.xsd of Jenkins' xunit plugin; the first of each pair are required
    "testsuites": ((), ("name", "time", "tests", "failures", "errors")),
    "testsuite": (("name", "tests", "failures", "errors"), ("time", "skipped", "timestamp", "hostname", "id")),
    "testcase": (("name",), ("time", "classname", "group")),
    "failure": ((), ("type", "message")),
    "error": ((), ("type", "message")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AuditRun]:
    """`before` breaches 5% at exit 2 of 2, `after` keeps it."""
    folder = tmp_path_factory.mktemp("gate")
    vqa = {"vqa_accuracy": rows(100, bad=2, num_exits=2, good=1.0)}
    bad = [[0.0, float(i < 40)] for i in range(128)]
    return {
        "before": write_run(folder / "before", {"asr": bad, **vqa}),
        "after": write_run(folder / "after", {"asr": rows(128, bad=1, num_exits=2), **vqa}),
        "few": write_run(folder / "few", {"asr": rows(20, num_exits=2), **vqa}),
        "hostile": write_run(folder / "hostile", {"asr": rows(100, bad=50)}, categories=[HOSTILE]),
    }


def _gate(name: AuditRun, *flags: str) -> int:
    return run(["gate", str(name.path), *flags])


def test_the_three_statuses(runs: dict[str, AuditRun], capsys: pytest.CaptureFixture[str], fail: Any) -> None:
    assert _gate(runs["after"], "--max-asr", "0.05", "--min-vqa", "0.9") == 0
    output = capsys.readouterr()
    assert "The gate is passed: all 4 within their limits." in output.out
    assert "4.3%" in output.out  # Wilson's limit of 1 in 128
    assert output.err == ""

    assert _gate(runs["before"], "--max-asr", "0.05") == 1
    output = capsys.readouterr()
    assert output.out.count("BREACHED") == 1 and "BREACHED by its interval" not in output.out
    assert output.err == "exitsafe: The gate is breached: 1 of 2 breach.\n"

    assert _gate(runs["few"], "--max-asr", "0.05") == 2
    output = capsys.readouterr()
    assert (
        "NOT JUDGED, 2 of 2: asr at most 0.05 (rule), exits 1, 2 (20 samples are too few). To fix: audit at least 73 "
        "harmful samples."
    ) in " ".join(output.out.split())
    assert output.out.count("exits 1, 2") == 1
    assert output.err == "exitsafe: The gate is not passed: 2 of 2 could not be judged.\n"


def test_a_breach_by_the_interval_alone_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = write_run(tmp_path / "run", {"asr": [[float(i < 5), float(i < 40)] for i in range(128)]})
    assert _gate(found, "--max-asr", "0.05") == 1
    rows_of = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [cells[-2].strip() for cells in rows_of] == ["BREACHED by its interval", "BREACHED"]


def test_json_is_one_document_whatever_the_status(
    runs: dict[str, AuditRun], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status, outcome in (("after", 0, "pass"), ("before", 1, "breach"), ("few", 2, "unjudged")):
        assert _gate(runs[name], "--max-asr", "0.05", "--json") == status
        document = json.loads(capsys.readouterr().out)
        assert document["outcome"] == outcome
        first = document["findings"][0]
        assert (first["metric"], first["place"]["exit_layer"], first["limit"]) == ("asr", 1, 0.05)


def test_regression_flags(runs: dict[str, AuditRun], capsys: pytest.CaptureFixture[str]) -> None:
    against = ("--against", str(runs["before"].path), "--json")
    assert _gate(runs["after"], "--max-regression", "0.08", *against) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {(each["metric"], each["limit"]) for each in found} == {("asr", 0.08), ("vqa_accuracy", 0.08)}
    one = ("--max-regression", "asr=0.1", "--max-regression", "0.08")
    assert _gate(runs["after"], *one, *against) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {(each["metric"], each["limit"]) for each in found} == {("asr", 0.1), ("vqa_accuracy", 0.08)}


def test_rules_from_a_file_take_scope_and_layers_of_the_flags(
    runs: dict[str, AuditRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules, config = tmp_path / "rules.yaml", tmp_path / "gate.yaml"
    rules.write_text("rules: [{metric: asr, max: 0.05}, {metric: vqa_accuracy, min: 0.5, layers: 1, scope: bins}]")
    config.write_text(f"rules: {rules}\nlayers: 2\nmax_asr: 0.06\n")
    assert _gate(runs["after"], "--config", str(config), "--json") == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    places = [(each["metric"], each["limit"], each["place"]["exit_layer"], each["place"]["bin"]) for each in found]
    assert places == [
        ("asr", 0.06, 2, None),
        ("asr", 0.05, 2, None),
        ("vqa_accuracy", 0.5, None, "early"),
        ("vqa_accuracy", 0.5, None, "average"),
    ]


def test_junit_is_what_ci_systems_read(runs: dict[str, AuditRun], tmp_path: Path) -> None:
    path = tmp_path / "new" / "gate.xml"
    assert _gate(runs["before"], "--max-asr", "0.05", "--max-toxicity", "0.1", "--junit", str(path)) == 1
    root = ElementTree.parse(path).getroot()
    for element in root.iter():
        required, allowed = JENKINS[element.tag]
        assert set(required) <= set(element.attrib) <= {*required, *allowed}
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert {name: suite.attrib[name] for name in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    cases = suite.findall("testcase")
    assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == 3  # GitLab drops doubles
    assert [[child.tag for child in case] for case in cases] == [[], ["failure"], ["error"]]
    failure = cases[1][0]
    assert failure.text == failure.attrib["message"]  # GitLab shows the text, Jenkins both
    assert "value 31.3%, bound 39.7%, better end 23.9%, n=128" in (failure.text or "")


def test_the_summary_is_appended(runs: dict[str, AuditRun], tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("# job\n")
    for _ in range(2):
        assert _gate(runs["after"], "--max-asr", "0.05", "--summary", str(path)) == 0
    text = path.read_text()
    assert text.startswith("# job\n### exitsafe gate: made-up\n")
    assert text.count("**The gate is passed: all 2 within their limits.**") == 2
    assert "| asr at most 0.05 (rule) | exit 1 | 0.8% | 4.3% | 128 | passes |" in text


def test_names_of_categories_are_text_everywhere(
    runs: dict[str, AuditRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit, summary = tmp_path / "gate.xml", tmp_path / "gate.md"
    flags = ("--max-asr", "0.05", "--scope", "categories", "--junit", str(junit), "--summary", str(summary))
    assert _gate(runs["hostile"], *flags) == 1
    printed = capsys.readouterr()
    assert "<img" in printed.out
    for text in (printed.out, printed.err, junit.read_text(), summary.read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    case = ElementTree.parse(junit).getroot()[0][0]
    assert "<img src=x> `c` [d]" in case.attrib["name"]
    (row,) = [line for line in summary.read_text().splitlines() if "img" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 7  # six columns, no more
    for markup in ("<img", "`c`", "[d]", "https://", "www.f"):
        assert markup not in row


def test_cases_have_names_of_their_own(tmp_path: Path) -> None:
    """GitLab drops doubles; `(none)`, long names and names with hidden characters look like others."""
    names = ["", "(none)", "a\u202eb", "a\u202db", "x" * 3000, "x" * 3001]
    found = write_run(tmp_path / "run", {"asr": rows(120, num_exits=2)}, categories=names)
    _gate(found, "--max-asr", "0.4", "--scope", "categories", "--junit", str(tmp_path / "gate.xml"))
    cases = [case.attrib["name"] for case in ElementTree.parse(tmp_path / "gate.xml").getroot()[0]]
    assert len(cases) == len(set(cases)) == 12
    assert max(map(len, cases)) < 150


def test_files_that_are_passed_on_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    home = tmp_path / "home of ann"
    judge, files = f"reward:{home}/judge", [tmp_path / "gate.xml", tmp_path / "gate.md"]
    found = [
        write_run(home / name, {"asr": rows(80)}, judge=f"{judge}{name}", model=f"{home}/model")
        for name in ("before", "after")
    ]
    flags = ("--max-asr", "0.04", "--min-vqa", "0.5", "--max-regression", "0.1", "--against", str(found[0].path))
    _gate(found[1], *flags, "--junit", str(files[0]), "--summary", str(files[1]))
    for text in (path.read_text() for path in files):
        assert "ann" not in text
        assert "exitsafe gate" in text and "model" in text and "judgeafter" in text


def test_no_text_of_an_answer_is_anywhere(
    runs: dict[str, AuditRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "gate.xml", tmp_path / "gate.md"]
    for flags in ([], ["--json"]):
        _gate(runs["before"], "--max-asr", "0.05", "--junit", str(files[0]), "--summary", str(files[1]), *flags)
    output = capsys.readouterr()
    assert any(response.text == ANSWER for response in runs["before"].responses())
    for text in (output.out, output.err, *(path.read_text() for path in files)):
        assert ANSWER not in text


def test_a_long_table_shows_what_did_not_pass_and_the_closest_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_tables, "MOST_ROWS", 3)
    table = [[0.0, float(i < 2), float(i < 9), 0.0] for i in range(128)]
    found = write_run(tmp_path / "run", {"asr": table})
    assert _gate(found, "--max-asr", "0.07") == 1
    output = capsys.readouterr().out
    assert "2 more pass by a wider margin" in output
    assert "exit 2" in output and "exit 3" in output
    assert "exit 1" not in output and "exit 4" not in output


def test_what_is_refused(runs: dict[str, AuditRun], tmp_path: Path, fail: Any) -> None:
    path, other = runs["after"].path, runs["before"].path
    assert "no limit given; give e.g. --max-asr 0.05" in fail("gate", path)
    assert "--max-asr: max: 5 can be shown by no number" in fail("gate", path, "--max-asr", "5")
    assert "--max-regression x: max_regression: Input should be" in fail(
        *("gate", path, "--max-regression", "asr=x", "--against", other)
    )
    assert "give --against RUN" in fail("gate", path, "--max-regression", "asr=0.02")
    assert "give --against RUN" in fail("gate", path, "--max-regression", "0.02")
    for first, second, words in (("0.1", "0.2", "every share has"), ("asr=0.1", "asr=0.2", "asr has")):
        twice = ("--max-regression", first, "--max-regression", second)
        assert f"{words} a limit already" in fail("gate", path, *twice, "--against", other)
    assert "--against is for --max-regression" in fail("gate", path, "--max-asr", "0.1", "--against", other)
    assert "--scope rooms must be layers or bins" in fail("gate", path, "--max-asr", "0.1", "--scope", "rooms")
    assert "choose 1 to 6" in fail("gate", path, "--max-asr", "0.1", "--layers", "9")
    assert "max_unscored=1 must be" in fail("gate", path, "--max-asr", "0.1", "--config", "max_unscored=1")
    assert "is not a folder" in fail("gate", tmp_path / "nowhere", "--max-asr", "0.1")
    rules = tmp_path / "gate.yaml"
    assert "cannot be read" in fail("gate", path, "--rules", rules)
    rules.write_text("rules: [{metric: asr, max_regression: 0.02}]")
    assert "max_regression in --rules needs the run" in fail("gate", path, "--rules", rules)


def test_an_unfinished_run_is_not_judged(runs: dict[str, AuditRun], tmp_path: Path, fail: Any) -> None:
    head = json.loads((runs["after"].path / "run.json").read_text())
    del head["results"]
    (tmp_path / "run.json").write_text(json.dumps(head))
    assert "is not finished" in fail("gate", tmp_path, "--max-asr", "0.05")
