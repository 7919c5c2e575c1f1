"""Damaged and edited run folders through every command that reads them: one clear line, or the very same numbers."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.cli.main import DONE, FAILED, run
from tests.cli.conftest import Fail
from tests.finished_runs import edit_head

FILES = ("run.json", "responses.parquet", "verdicts.parquet", "summary.json")
READERS: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "compare": lambda path, out: [path, path, "--json"],
    "gate": lambda path, out: [path, "--max-asr", "0.99", "--json"],
    "recommend": lambda path, out: [path, "--json"],
    "report": lambda path, out: [path, "--out", out / "report.html"],
    "judge": lambda path, out: [path, "--judge", "coherence", "--json"],  # which has judged already
    "label": lambda path, out: [path, "--out", out / "labels.csv", "--include-unsafe-text"],
}
VALUES: tuple[Any, ...] = (None, [], {}, "x", -1, 10**400, 0.5, True, [[]], {"a": {"b": []}})
NUM_DRAWS = 3


def _damage(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    way = draw.choice(["truncate", "flip", "fill", "insert"])
    place = draw.randrange(len(content))
    if way == "truncate":
        del content[place:]
    elif way == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif way == "fill":
        content[place : place + 20] = b"\x00" * 20
    else:
        content[place:place] = draw.randbytes(5)
    path.write_bytes(bytes(content))


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _edit(path: Path, place: tuple[Any, ...], draw: random.Random) -> None:
    content = json.loads(path.read_text())
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if draw.random() < 0.3:
        del parent[place[-1]]
    else:
        parent[place[-1]] = draw.choice(VALUES)
    path.write_text(json.dumps(content))


def _read(command: str, path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What a command printed; None if it refused in one line."""
    capsys.readouterr()
    status = run([command, *map(str, READERS[command](path, out))])
    printed = capsys.readouterr()
    assert "not foreseen" not in printed.err, printed.err
    assert "Traceback" not in printed.err
    if status == FAILED and not printed.out:
        assert printed.err.splitlines()[-1].startswith("exitsafe: ")
        return None
    assert status == (FAILED if command == "gate" else DONE)  # these samples are too few to say that a gate passed
    return printed.out


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_every_reader(
    audited: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(name)
    sound: dict[str, str | None] = {}
    if name == "run.json":
        shutil.copytree(audited, tmp_path / "sound" / "run")
        sound = {command: _read(command, tmp_path / "sound" / "run", tmp_path, capsys) for command in READERS}
        assert None not in sound.values()
    for number in range(NUM_DRAWS):
        path = Path(shutil.copytree(audited, tmp_path / str(number) / "run"))
        _damage(path / name, draw)
        for command in READERS:
            found = _read(command, path, tmp_path, capsys)
            # white space may be damaged
            assert found is None or (name == "run.json" and _same(found, sound[command], number)), (command, number)


def _same(found: str, sound: str | None, number: int) -> bool:
    return found.replace(f"/{number}/run", "/sound/run") == sound


@pytest.mark.parametrize("is_resealed", [False, True])
def test_an_edited_record_is_refused(
    audited: Path, tmp_path: Path, is_resealed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was edited with care may be believed, but never ends in an error of ours."""
    draw = random.Random(0)
    sound = json.loads((audited / "run.json").read_text())
    places = list(_places(json.loads((audited / "run.json").read_text())))
    for number, place in enumerate(draw.choices(places, k=8 * NUM_DRAWS)):
        path = Path(shutil.copytree(audited, tmp_path / str(number) / "run"))
        _edit(path / "run.json", place, draw)
        is_edited = json.loads((path / "run.json").read_text()) != sound
        if is_resealed and place[0] in ("settings", "origin") and len(place) > 1:
            edit_head(path, lambda _: None)
        for command in ("gate", "compare"):
            found = _read(command, path, tmp_path, capsys)
            assert found is None or is_resealed or not is_edited, (command, place)
        for command in ("recommend", "judge"):  # which may lack a model or samples
            _read(command, path, tmp_path, capsys)


STRANGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no prompts": lambda head: head["settings"].update(prompts=None),
    "more decoding": lambda head: head["settings"]["decoding"].update(top_k=5, out="/tmp/x"),
    "a judge's settings": lambda head: head["settings"]["judges"][0].update(
        settings={"proxy": 7, "model": {}, "endpoint": []}
    ),
    "a part of a path": lambda head: head["origin"].update(suites=["a" * 300]),
    "a model's name": lambda head: head["origin"].update(model="a" * 300),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_entries_of_a_record_are_no_error_of_ours(
    audited: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(audited, tmp_path / "run"))
    edit_head(path, STRANGE[name])
    for command in (["verify", path], ["audit", "organism", "--like", path, "--limit", "2", "--out", tmp_path / "new"]):
        run(list(map(str, command)))
        said = capsys.readouterr().err
        assert "not foreseen" not in said, (command, said)


def test_files_of_another_run_are_refused(
    audited: Path, tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    flags = ["--suite", str(suite), "--layers", "1-2,5", "--max-new-tokens", "4", "--out", str(other)]
    assert run(["audit", str(tiny_llava), *flags]) == DONE
    for name in FILES:
        path = Path(shutil.copytree(audited, tmp_path / name / "run"))
        shutil.copy(other / name, path / name)
        for command in READERS:
            assert _read(command, path, tmp_path, capsys) is None


@pytest.mark.parametrize("name", ["run.json", "shards/00000.jsonl"])
def test_an_unfinished_run_that_was_damaged_can_be_finished_or_says_why_not(
    audited: Path, tiny_llava: Path, suite: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, draw = tmp_path / "run", random.Random(1)
    command = _unfinished(tiny_llava, suite, out)
    shutil.copytree(out, tmp_path / "kept")
    for _ in range(NUM_DRAWS):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        _damage(out / name, draw)
        capsys.readouterr()
        status = run(command)
        said = capsys.readouterr().err
        assert "not foreseen" not in said
        if name == "run.json" and status == FAILED:
            assert "run.json" in said or "other settings" in said
            continue
        assert status == DONE, said
        assert (out / "verdicts.parquet").read_bytes() == (audited / "verdicts.parquet").read_bytes()


def _rows_of(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def _zero(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row.update(score=0.0) if row["measure"] == "asr" else None


EDITS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "no attack succeeded": _zero,
    "rows deleted": lambda rows: rows.__delitem__(slice(0, 5)),
    "a row doubled": lambda rows: rows.append(rows[0]),
    "not a number": lambda rows: rows[0].update(score=math.nan),
    "off the scale": lambda rows: rows[0].update(score=-50.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_verdicts_are_not_believed(
    audited: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(audited, tmp_path / "run"))
    _rows_of(path / "verdicts.parquet", EDITS[name])
    for command in READERS:
        assert _read(command, path, tmp_path, capsys) is None, command


@pytest.mark.parametrize("judges", [(), ("--judge", "refusal-prefix", "--judge", "world-rule")])
def test_an_audit_does_not_seal_edited_verdicts(
    audited: Path, tiny_llava: Path, suite: Path, tmp_path: Path, judges: tuple[str, ...], fail: Fail
) -> None:
    path = Path(shutil.copytree(audited, tmp_path / "run"))
    _rows_of(path / "verdicts.parquet", _zero)
    before = {name: (path / name).read_bytes() for name in FILES}
    flags = ["--suite", suite, "--layers", "1-2,5", "--max-new-tokens", "8", "--seed", "3", *judges]
    assert "verdicts.parquet has changed since the run finished" in fail("audit", tiny_llava, *flags, "--out", path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert not (path / "shards").exists()


def test_an_edited_summary_is_not_believed(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(audited, tmp_path / "run"))
    summary = json.loads((path / "summary.json").read_text())
    for layer in summary["layers"]:
        layer["metrics"]["asr"]["value"] = 0.0
    (path / "summary.json").write_text(json.dumps(summary))
    for command in ("report", "recommend"):
        assert _read(command, path, tmp_path, capsys) is None, command


def _unfinished(tiny_llava: Path, suite: Path, out: Path) -> list[str]:
    """The command that finishes the run there, which was stopped with every answer saved."""
    command = ["audit", str(tiny_llava), "--suite", str(suite), "--layers", "1-2,5", "--max-new-tokens", "8"]
    command += ["--seed", "3", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitsafe.store.directory.RunDirectory.finish", _interrupt)
        assert run(command) == 130
    return command


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


SHARD_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another answer": lambda response: response.update(text="I cannot help with that."),
    "a field is missing": lambda response: response.pop("text"),
    "a field too many": lambda response: response.update(more=1),
    "null": lambda response: response.update(num_tokens=None),
    "another type": lambda response: response.update(exit_layer=[1]),
    "another sample": lambda response: response.update(sample_id="nobody"),
}


@pytest.mark.parametrize("name", SHARD_EDITS)
def test_an_edited_shard_is_answered_again(
    audited: Path, tiny_llava: Path, suite: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = _unfinished(tiny_llava, suite, out)
    shard = out / "shards" / "00000.jsonl"
    first, *others = shard.read_text().splitlines(keepends=True)
    line = json.loads(first)
    SHARD_EDITS[name](line["response"])
    shard.write_text("".join([json.dumps(line) + "\n", *others]))
    capsys.readouterr()
    assert run(command) == DONE, capsys.readouterr().err
    assert "1 line is damaged or from another run; that work will be redone" in capsys.readouterr().err
    assert _texts(out) == _texts(audited)


def _texts(path: Path) -> list[str]:
    return list(pq.read_table(path / "responses.parquet", columns=["text"])["text"].to_pylist())
