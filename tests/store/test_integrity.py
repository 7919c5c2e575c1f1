"""What a reader of a finished run notices: damage by the hashes, edits by someone who mends the hashes by the rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.errors import RunError
from exitsafe.records import KINDS, Response, Verdict
from exitsafe.results.run import load_run
from exitsafe.results.stopping import BLOCK, _key
from exitsafe.store.tables import SampleInfo
from tests.finished_runs import edit_head, write_finished

SAMPLES = [
    SampleInfo(id=f"s{number}", kind=KINDS[number % 4], category="", source="s", digest=str(number))
    for number in range(8)
]
JUDGES = [{"name": "rule", "measures": ["asr", "refusal"]}, {"name": "guard", "measures": ["asr"]}]
WAY_OUT = "restore the run from its source, or audit again"


def _responses(samples: list[SampleInfo]) -> list[Response]:
    return [
        Response(
            sample_id=s.id, exit_layer=layer, text=f"{s.id}{layer}", num_tokens=2, finish_reason="stop", seconds=0.5
        )
        for s in samples
        for layer in (1, 2)
    ]


def _verdicts(samples: list[SampleInfo], score: float = 1.0) -> list[Verdict]:
    return [
        Verdict(sample_id=s.id, exit_layer=layer, judge=judge, measure=measure, label="l", score=score)
        for s in samples
        for layer in (1, 2)
        for judge, measure in (("rule", "asr"), ("rule", "refusal"), ("guard", "asr"))
        if measure == "refusal" or s.kind == "harmful"
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_finished(tmp_path / "run", SAMPLES, _responses(SAMPLES), _verdicts(SAMPLES), judges=JUDGES).path


def _complaint(run: Path) -> str:
    with pytest.raises(RunError) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["responses.parquet", "verdicts.parquet", "summary.json"])
def test_a_file_that_is_not_the_runs_is_named_with_the_way_out(run: Path, name: str, tmp_path: Path) -> None:
    path = run / name
    content = path.read_bytes()
    for damaged in (content[:-1], content + b" ", content[:50] + bytes([content[50] ^ 1]) + content[51:], b""):
        path.write_bytes(damaged)
        assert f"{path} has changed since the run finished" in _complaint(run)
        assert WAY_OUT in _complaint(run)
    path.unlink()
    assert f"{path} is missing; {WAY_OUT}" in _complaint(run)
    path.mkdir()
    assert f"{path} is not a regular file" in _complaint(run)
    path.rmdir()
    os.mkfifo(path)  # opened, it would wait for a writer for ever
    assert f"{path} is not a regular file" in _complaint(run)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("settings", lambda settings: settings["judges"].reverse()),
        ("settings", lambda settings: settings["model"].update(default_exit=1)),
        ("settings", lambda settings: settings["model"].update(num_layers=9)),
        ("settings", lambda settings: settings.update(stop_when={"max_asr": 0.5, "error": 0.1})),
        ("origin", lambda origin: origin.pop("replaced_judges")),  # cautions and cards are made of it
        (
            "origin",
            lambda origin: origin.update(hub={"suite": {"id": "a/b", "configs": [], "split": "test", "revision": "c"}}),
        ),
        ("origin", lambda origin: origin.update(note="x")),
    ],
)
def test_what_was_edited_in_run_json_is_noticed(
    run: Path, part: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_head(run, lambda head: head.update(origin={"replaced_judges": {"rule": "qwen3guard"}, "suites": ["suite"]}))
    assert any("rule judged instead" in line for line in load_run(run).cautions)
    head = json.loads((run / "run.json").read_text())
    change(head[part])
    (run / "run.json").write_text(json.dumps(head))
    assert f"run.json was changed after the run finished ({part})" in _complaint(run)


def _forge(run: Path, name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Edit the rows of a table and mend its hash."""
    table = pq.read_table(run / name)
    rows = table.to_pylist()
    changed = change(rows)
    rows = changed if isinstance(changed, list) else rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), run / name)
    _mend(run, name)


def _mend(run: Path, name: str) -> None:
    digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
    edit_head(run, lambda head: head["results"]["files"].update({name: digest}))


FORGED_VERDICTS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "deleted": (lambda rows: rows.pop(4), "no verdicts of 'rule' on refusal for sample 's0' at exit 2"),
    "doubled": (lambda rows: rows.append(rows[0]), "2 verdicts of 'rule' on asr for sample 's0' at exit 1"),
    "nan": (lambda rows: rows[0].update(score=math.nan), "a value of score is not a number"),
    "infinite": (lambda rows: rows[0].update(score=math.inf), "a value of score is not a number"),
    "off the scale": (lambda rows: rows[0].update(score=-50.0), "a score of 'rule' is out of range for asr"),
    "no score, no reason": (lambda rows: rows[0].update(score=None), "both a score and an unscored reason, or neither"),
    "score and reason": (lambda rows: rows[0].update(unscored="x"), "both a score and an unscored reason, or neither"),
    "another judge": (lambda rows: rows[0].update(judge="me"), "no verdicts of 'rule' on asr"),
    "one more judge": (lambda rows: rows.append({**rows[0], "judge": "me"}), "has no judge 'me' that measures 'asr'"),
    "another measure": (lambda rows: rows.append({**rows[0], "measure": "wit"}), "'rule' that measures 'wit'"),
    "another sample": (lambda rows: rows.append({**rows[0], "sample_id": "z"}), "sample 'z' is not among the answers"),
    "another exit": (lambda rows: rows.append({**rows[0], "exit_layer": 3}), "exit 3 is not among the exits"),
    "all gone": (lambda rows: rows.clear(), "no verdicts of 'rule' on asr"),
}
FORGED_ANSWERS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "deleted": (lambda rows: rows.pop(3), "there is no answer for sample 's1' at exit 2"),
    "a sample deleted": (lambda rows: rows[2:], "its samples are not those in run.json"),
    "doubled": (lambda rows: rows.append(rows[0]), "2 answers for sample 's0' at exit 1; there must be one"),
    "another kind": (lambda rows: [row | {"kind": "benign"} for row in rows], "its samples are not those in run.json"),
    "two kinds": (lambda rows: rows[0].update(kind="benign"), "the rows of one sample differ"),
    "no kind": (lambda rows: [row | {"kind": "evil"} for row in rows], "kind 'evil' is unknown"),
    "another digest": (lambda rows: [row | {"digest": "x"} for row in rows], "its samples are not those in run.json"),
    "another exit": (lambda rows: rows[0].update(exit_layer=3), "exit 3 is not among the exits of run.json"),
    "time runs back": (lambda rows: rows[0].update(seconds=-1.0), "a value of seconds is not a number of 0 or more"),
    "another ending": (lambda rows: rows[0].update(finish_reason="x"), "finish_reason 'x' is not stop or length"),
    "all gone": (lambda rows: rows.clear(), "it has 0 samples"),
}


FORGED = {"verdicts.parquet": FORGED_VERDICTS, "responses.parquet": FORGED_ANSWERS}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, forged in FORGED.items() for name in forged])
def test_forged_rows(run: Path, file: str, name: str) -> None:
    change, said = FORGED[file][name]
    _forge(run, file, change)
    assert _complaint(run).startswith(f"{run}/{file}: ")
    assert said in _complaint(run)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("verdicts.parquet", lambda table: table.drop_columns(["score"]), "no column 'score'"),
        ("responses.parquet", lambda table: table.drop_columns(["text"]), "no column 'text'"),
        (
            "verdicts.parquet",
            lambda table: table.set_column(5, "score", pa.array(["1"] * len(table))),
            "column 'score' has type dictionary",
        ),
        (
            "responses.parquet",
            lambda table: table.set_column(6, "text", pa.nulls(len(table), pa.string())),
            "column 'text' has rows without a value",
        ),
        (
            "responses.parquet",
            lambda table: table.set_column(6, "text", pa.array([b"\xff"] * len(table)).cast(pa.binary())),
            "column 'text' has type",
        ),
    ],
)
def test_tables_of_another_shape(run: Path, name: str, change: Callable[[pa.Table], pa.Table], said: str) -> None:
    pq.write_table(change(pq.read_table(run / name)), run / name)
    _mend(run, name)
    assert f"{run / name} cannot be read" in _complaint(run)
    assert said in _complaint(run)


def test_numbers_come_from_verdicts_and_not_from_summary_json(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    honest = load_run(run).summary
    assert summary == honest
    for layer in summary["layers"]:
        layer["metrics"]["asr"]["value"] = 0.0
    (run / "summary.json").write_text(json.dumps(summary))
    _mend(run, "summary.json")
    assert load_run(run).summary == honest


HEADS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no judges": (lambda head: head["settings"].pop("judges"), "settings.judges: Field required"),
    "a list": (lambda head: head["settings"].update(model=[]), "settings.model: Input should be"),
    "null": (lambda head: head.update(settings=None), "settings: Input should be"),
    "exits": (lambda head: head["settings"].update(exit_layers=[1, 10**400]), "settings.exit_layers.1"),
    "order of exits": (lambda head: head["settings"].update(exit_layers=[2, 1]), "must be ascending"),
    "beyond": (lambda head: head["settings"].update(exit_layers=[1, 7]), "an exit is beyond the 3 blocks"),
    "measure": (lambda head: head["settings"]["judges"][0].update(measures=["wit"]), "must be one of asr"),
    "twice": (lambda head: head["settings"]["judges"].append(head["settings"]["judges"][0]), "a judge is listed twice"),
    "loading": (lambda head: head["origin"].update(loading={"eval": "x"}), "origin.loading.eval: Extra inputs"),
    "suites": (lambda head: head["origin"].update(suites="x"), "origin.suites: Input should be a valid list"),
    "null character": (lambda head: head["origin"].update(images="a\x00b"), "must not contain a null character"),
    "prompts": (lambda head: head["settings"].update(prompts=7), "settings.prompts: Input should be"),
    "no date": (
        lambda head: head["settings"].update(prompts={"hash": "x", "today": "tomorrow"}),
        "settings.prompts.today: Value error, must be a date such as 2026-01-31",
    ),
    "a number for a date": (
        lambda head: head["settings"].update(prompts={"hash": "x", "today": 7}),
        "settings.prompts.today: Input should be a valid string",
    ),
    "trained on": (
        lambda head: head["settings"].update(trained_on={"samples": "x", "of": 1}),
        "settings.trained_on.samples: Input should be a valid integer",
    ),
    "proxy": (lambda head: head["settings"]["judges"][0].update(proxy=7), "judges.0.proxy: Input should be"),
    "list for a proxy": (
        lambda head: head["settings"]["judges"][0].update(proxy={"asr": ["a"]}),
        "judges.0.proxy.asr: Input should be a valid string",
    ),
    "replaced judges": (lambda head: head["origin"].update(replaced_judges=5), "origin.replaced_judges: Input should"),
    "a long suite": (lambda head: head["origin"].update(suites=["a" * 5000]), "should have at most 4096 characters"),
    "a long model": (lambda head: head["origin"].update(model="a" * 5000), "should have at most 4096 characters"),
    "hashes": (lambda head: head["results"].update(files={}), "it has no hash of"),
    "pending": (lambda head: head.update(next={"settings": 1}), "next.settings: Input should be"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_another_shape(run: Path, name: str) -> None:
    change, said = HEADS[name]
    head = json.loads((run / "run.json").read_text())
    change(head)
    (run / "run.json").write_text(json.dumps(head))
    assert f"{run}/run.json cannot be read" in _complaint(run)
    assert said in _complaint(run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "it is nested too deeply"),
        (b'{"format": 3, "settings": NaN}', "it contains NaN, which is not a number"),
        (b'{"format": 3, "settings": 1e999}', "it contains a number that is too large"),
        (b'{"format": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b"\xff\xfe\x00", "it is not"),
        (b'{"format": "\\ud83d"}', "it is not UTF-8 text"),
        (b"null", "it is not a JSON object"),
    ],
)
def test_a_head_that_is_not_json(run: Path, content: bytes, said: str) -> None:
    (run / "run.json").write_bytes(content)
    assert said in _complaint(run)


MANY = [
    SampleInfo(id=i, kind="harmful", category="", source="s", digest=i)
    for i in sorted((f"h{number}" for number in range(6 * BLOCK)), key=lambda i: _key(i, 0))
]


def _stopped(path: Path, *, num_asked: int, score: float = 0.0) -> Path:
    """Exit 1 was asked the first samples only; the other was asked all, and its side of the limit stays open."""
    first = {sample.id for sample in MANY[:num_asked]}
    responses = [r for r in _responses(MANY) if r.exit_layer == 2 or r.sample_id in first]
    verdicts = [
        replace(v, score=score if v.exit_layer == 1 else float(int(v.sample_id[1:]) % 5 == 0))
        for v in _verdicts(MANY)
        if (v.exit_layer == 2 or v.sample_id in first) and v.measure == "asr"
    ]
    judges = [{"name": "rule", "measures": ["asr"]}, {"name": "guard", "measures": ["asr"]}]
    stop_when = {"max_asr": 0.2, "error": 0.1}
    return write_finished(path, MANY, responses, verdicts, judges=judges, stop_when=stop_when).path


def test_what_stopped_is_worked_out_again(tmp_path: Path) -> None:
    stopping = load_run(_stopped(tmp_path, num_asked=2 * BLOCK)).summary["stopping"]
    assert stopping["layers"] == [
        {"exit_layer": 1, "decision": "below", "n": 2 * BLOCK, "unscored": 0},
        {"exit_layer": 2, "decision": None, "n": 6 * BLOCK, "unscored": 0},
    ]
    assert stopping["judge"] == "rule"


def test_answers_that_the_rule_does_not_account_for_are_missing(tmp_path: Path) -> None:
    """Nobody can pass off deleted rows as an exit that stopped."""
    for number, (num_asked, score) in enumerate(((2 * BLOCK - 1, 0.0), (5, 0.0), (0, 0.0))):
        with pytest.raises(RunError, match="answers are missing at exit 1, which did not stop early"):
            _stopped(tmp_path / str(number), num_asked=num_asked, score=score)
