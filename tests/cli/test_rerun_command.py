from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.cli.main import run
from exitsafe.cli.verify_command import compare_runs
from exitsafe.results.run import load_run
from tests.cli.conftest import Fail
from tests.finished_runs import edit_head


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


@pytest.fixture
def rerun(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def call(*arguments: str | Path, status: int = 0) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert run(["verify", *map(str, arguments), "--json"]) == status
        output = capsys.readouterr()
        return json.loads(output.out), output.err

    yield call


def test_an_audit_is_repeated_from_its_own_record(copied: Path, rerun: Any) -> None:
    edit_head(copied, lambda head: head["origin"].update(judge_pass="second"))
    found, _ = rerun(copied)
    assert found == {
        "run": str(copied),
        "again": str(copied.with_name("run-again")),
        "answers": 24,
        "answers_generated": 24,
        "answers_same": 24,
        "answers_different": 0,
        "verdicts": 60,
        "verdicts_judged": 60,
        "verdicts_same": 60,
        "verdicts_different": 0,
        "metrics_changed": [],
        "settings_changed": [],
    }
    again = load_run(copied.with_name("run-again"))
    assert again.settings == load_run(copied).settings
    assert again.origin == load_run(copied).origin  # judged in a second pass, on the same device


def test_a_finished_repeat_beside_the_run_is_not_taken_for_this_calls(copied: Path, rerun: Any, fail: Fail) -> None:
    """Whoever forged the run may have put it there."""
    beside = Path(shutil.copytree(copied, copied.with_name("run-again")))
    found, _ = rerun(copied)
    assert (found["again"], found["answers_generated"]) == (str(copied.with_name("run-again-2")), 24)
    assert "is finished, so nothing would be repeated; choose a new folder for --out" in fail(
        "verify", copied, "--out", beside
    )


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(copied: Path) -> Path:
    """A repeat with every answer and verdict, which was stopped at its very end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitsafe.store.directory.RunDirectory.finish", _interrupt)
        assert run(["verify", str(copied)]) == 130
    return copied.with_name("run-again")


def test_an_unfinished_repeat_beside_the_run_is_not_resumed_unasked(
    copied: Path, unfinished: Path, rerun: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = rerun(copied)
    assert (found["again"], found["answers_generated"]) == (str(copied.with_name("run-again-2")), 24)
    found, notes = rerun(copied, "--out", unfinished, status=2)
    assert (found["answers"], found["answers_generated"], found["answers_same"]) == (24, 0, 0)
    assert (found["verdicts"], found["verdicts_judged"], found["verdicts_same"]) == (60, 0, 0)
    assert "every answer was already in" in notes and "choose a new folder for --out" in notes


def test_a_repeat_that_was_stopped_is_resumed_where_it_is_named_and_says_what_was_there(
    copied: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = unfinished / "shards" / "00000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(line for line in lines if '"response"' in line and '"s0"' in line))
    capsys.readouterr()
    assert run(["verify", str(copied), "--out", str(unfinished)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"21 of 21 answers and 60 of 60 verdicts of this call are the same. Files: {unfinished}",
        "Not repeated by this call: 3 answers, which were already there.",
        "No metric differs.",
    ]


def _forge(run: Path, name: str, change: Any) -> None:
    """Edit the rows of a table as someone would who knows that its hash is kept."""
    table = pq.read_table(run / name)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), run / name)
    digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
    edit_head(run, lambda head: head["results"]["files"].update({name: digest}))


def test_a_forged_run_is_not_repeated(copied: Path, rerun: Any) -> None:
    def flip(rows: list[dict[str, Any]]) -> None:
        asr = [row for row in rows if row["measure"] == "asr"]
        for row in asr:
            row["score"] = 1.0 - row["score"]

    _forge(copied, "verdicts.parquet", flip)
    found, notes = rerun(copied, status=2)
    assert (found["answers_same"], found["verdicts"], found["verdicts_same"]) == (24, 60, 54)
    assert any(line.startswith("exit 1.asr.value was ") for line in found["metrics_changed"])
    assert "does not match" in notes and "6 of 60 verdicts, " in notes


def test_a_text_that_differs_is_enough(copied: Path, rerun: Any) -> None:
    """Though no verdict hangs on it."""
    _forge(copied, "responses.parquet", lambda rows: rows[0].update(text=rows[0]["text"] + " "))
    found, notes = rerun(copied, status=2)
    assert (found["answers"], found["answers_same"], found["metrics_changed"]) == (24, 23, [])
    assert notes.splitlines()[-1].endswith("1 of 24 answers differ")


def test_an_edited_number_is_noticed_before_anything_is_repeated(copied: Path, fail: Fail) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    summary["layers"][0]["metrics"]["asr"]["value"] = 0.125
    (copied / "summary.json").write_text(json.dumps(summary))
    for command in (["verify", copied], ["gate", copied, "--max-asr", "0.5"], ["recommend", copied]):
        assert "summary.json has changed since the run finished" in fail(*command)
    assert not copied.with_name("run-again").exists()


def test_judges_with_other_settings_are_said(audited: Path) -> None:
    before = load_run(audited)
    judges = [{**judge, "settings": {"revision": "2"}} for judge in before.settings["judges"][:1]]
    changed = {**before.settings, "judges": judges + before.settings["judges"][1:]}
    found = compare_runs(before, replace(before, settings=changed))
    assert found["settings_changed"] == ['judges.refusal-prefix.settings.revision was absent, is now "2"']


def test_a_run_is_not_compared_with_itself(audited: Path, fail: Fail) -> None:
    assert "is the run that is to be repeated; choose another folder" in fail("verify", audited, "--out", audited)


def test_a_suite_that_has_changed_is_not_asked(copied: Path, fail: Fail) -> None:
    edit_head(copied, lambda head: head["origin"].update(limit=3))
    assert "have changed since; restore them" in fail("verify", copied)
    assert not copied.with_name("run-again").exists()


def test_a_run_of_the_python_api_says_no_suites(copied: Path, fail: Fail) -> None:
    edit_head(copied, lambda head: head.update(origin={}))
    assert "was not made by the command line" in fail("verify", copied)
