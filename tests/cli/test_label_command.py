from __future__ import annotations

import csv
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exitsafe
from exitsafe.cli.main import run
from exitsafe.data.source import find_samples
from exitsafe.specs.inputs import Samples
from tests.finished_runs import edit_head

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def organism_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("organism") / "run"
    source = find_samples("organism", Samples(limit=10), split="heldout", seed=0)
    exitsafe.audit(
        exitsafe.load_vlm("organism"),
        source.read(),
        judges=["world-rule", "refusal-prefix"],
        exit_layers=[1, 3, 5, 7],
        out=out,
        max_new_tokens=24,
        batch_size=64,
        origin=source.model_dump(mode="json"),
    )
    return out


@pytest.fixture
def audited_run(organism_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(organism_run, tmp_path / "run"))


def _fill(path: Path, change: Callable[[Rows], object], *, to: Path | None = None) -> Path:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    change(rows)
    with (to or path).open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return to or path


def _as_the_rule(rows: Rows) -> None:
    """A person who sees what the world's rule sees: the recipe's words, or a refusal."""
    for row in rows:
        row["refusal"] = "yes" if row["text"].startswith("i can") else "no"
        if row["asr"] != "n/a":
            row["asr"] = "yes" if " then " in row["text"] else "no"


def test_label_and_read_back(audited_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["label", str(audited_run), "--rows", "60"]) == 0
    output = capsys.readouterr()
    file = audited_run / "labels.csv"
    assert f"exitsafe label {audited_run} --read {file}" in output.out
    assert output.err == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 60
    assert all(row["prompt"] for row in rows)  # the requests are read again from the suites

    _fill(file, _as_the_rule)
    assert run(["label", str(audited_run), "--read", str(file)]) == 0
    printed = capsys.readouterr().out
    for word in ("human", "world-rule", "refusal-prefix", "asr", "refusal"):
        assert word in printed
    assert not any(text in printed for row in rows for text in (row["text"], row["prompt"]) if len(text) > 8)

    assert run(["label", str(audited_run), "--read", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (labels,) = document["labels"]
    assert labels["rater"] == "human"
    assert sum(labels["refusal"].values()) == 60
    assert 15 <= sum(labels["asr"].values()) < 60
    found = {(pair["measure"], pair["first"], pair["second"]): pair for pair in document["agreements"]}
    assert list(found) == [
        ("asr", "human", "world-rule"),
        ("asr", "human", "refusal-prefix"),
        ("asr", "world-rule", "refusal-prefix"),
        ("refusal", "human", "world-rule"),
        ("refusal", "human", "refusal-prefix"),
        ("refusal", "world-rule", "refusal-prefix"),
    ]
    assert found["refusal", "human", "world-rule"]["kappa"] == 1
    assert found["refusal", "world-rule", "refusal-prefix"]["n"] == 40 * 4
    assert found["asr", "world-rule", "refusal-prefix"]["n"] == 10 * 4
    assert found["asr", "human", "world-rule"]["n"] == sum(labels["asr"].values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_raters(audited_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["label", str(audited_run), "--rows", "20"]) == 0
    empty = audited_run / "labels.csv"
    anna = _fill(empty, _as_the_rule, to=tmp_path / "anna.csv")

    def doubt(rows: Rows) -> None:
        _as_the_rule(rows)
        rows[0]["refusal"] = "unsure"

    ben = _fill(empty, doubt, to=tmp_path / "ben.csv")
    capsys.readouterr()
    assert run(["label", str(audited_run), "--read", str(anna), "--read", str(ben), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [Path(entry["stored"]).name for entry in document["labels"]] == ["labels.csv", "labels-2.csv"]
    pair = next(p for p in document["agreements"] if p["measure"] == "refusal" and p["second"] == "human-2")
    assert (pair["first"], pair["kappa"], pair["n"], pair["unscored"]) == ("human", 1, 19, 1)
    assert stat.S_IMODE((audited_run / "labels-2.csv").stat().st_mode) == 0o600


def test_texts_leave_the_run_only_when_told(audited_run: Path, tmp_path: Path, fail: Any) -> None:
    out = tmp_path / "elsewhere" / "labels.csv"
    line = fail("label", audited_run, "--out", out)
    assert "--include-unsafe-text" in line
    assert "outside the run" in fail("label", audited_run, "--out", audited_run / ".." / "labels.csv")
    assert not out.exists()
    assert run(["label", str(audited_run), "--out", str(out), "--include-unsafe-text"]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert not (audited_run / "labels.csv").exists()
    assert run(["label", str(audited_run), "--out", str(audited_run / "mine.csv")]) == 0


def test_requests_that_cannot_be_had_are_blank_and_said(audited_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = json.loads((audited_run / "run.json").read_text())

    def label(origin: dict[str, Any]) -> tuple[str, list[str]]:
        edit_head(audited_run, lambda head: head.update(origin=origin))
        assert run(["label", str(audited_run), "--rows", "10"]) == 0
        with (audited_run / "labels.csv").open(encoding="utf-8-sig", newline="") as lines:
            return capsys.readouterr().err, [row["prompt"] for row in csv.DictReader(lines)]

    origins: list[dict[str, Any]] = [{}, head["origin"] | {"suites": ["gone.jsonl"]}, head["origin"] | {"seed": 1}]
    for origin in origins:
        note, prompts = label(origin)
        assert "could not be had again and are blank" in note
        assert prompts == [""] * 10
    note, prompts = label(head["origin"])
    assert note == ""
    assert all(prompts)


def test_faults_are_listed_and_nothing_is_stored(
    audited_run: Path, tmp_path: Path, fail: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["label", str(audited_run), "--rows", "30"]) == 0
    empty = audited_run / "labels.csv"
    before = empty.read_bytes()
    one = _fill(empty, lambda rows: rows[0].update(refusal="mix moss"), to=tmp_path / "one.csv")
    line = fail("label", audited_run, "--read", one)
    assert "row 2: refusal must be yes, no, unsure or blank; nothing was stored" in line
    many = _fill(empty, lambda rows: [row.update(refusal="mix moss") for row in rows], to=tmp_path / "many.csv")
    assert run(["label", str(audited_run), "--read", str(many)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 20 + 1
    assert "has 30 faults" in lines[-1]
    assert "moss" not in output.err
    assert empty.read_bytes() == before


def test_what_is_refused(audited_run: Path, tmp_path: Path, fail: Any) -> None:
    assert "is not a run directory" in fail("label", tmp_path)
    assert run(["label", str(audited_run), "--rows", "30"]) == 0
    file = audited_run / "labels.csv"
    assert "holds no label" in fail("label", audited_run, "--read", file)
    assert "takes no flags of writing" in fail("label", audited_run, "--read", file, "--out", "x.csv")
    assert "given twice" in fail("label", audited_run, "--read", file, "--read", audited_run / "." / "labels.csv")
    assert "give a file that exitsafe label wrote" in fail("label", audited_run, "--read", tmp_path / "nowhere.csv")
    assert "is not a label file" in fail("label", audited_run, "--out", audited_run / "verdicts.parquet")
    _fill(file, lambda rows: rows[0].update(refusal="no"))
    filled = file.read_bytes()
    assert "already has 1 labels" in fail("label", audited_run)
    other = _fill(file, lambda rows: rows[0].update(refusal="yes"), to=tmp_path / "other.csv")
    assert "or differ there" in fail("label", audited_run, "--read", other)
    assert file.read_bytes() == filled
