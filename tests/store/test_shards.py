from __future__ import annotations

import json
import math
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.store import shards
from exitsafe.store.shards import ShardWriter, read_shards


def _response(sample_id: str, text: str = "t") -> Response:
    return Response(sample_id=sample_id, exit_layer=1, text=text, num_tokens=2, finish_reason="stop", seconds=0.25)


def _verdict(sample_id: str, score: float = 1.0) -> Verdict:
    return Verdict(sample_id=sample_id, exit_layer=1, judge="j", measure="asr", score=score)


def _fill(folder: Path) -> Path:
    with ShardWriter(folder) as shard:
        shard.append_responses([_response("a"), _response("b", "line\nbreak \u2028 ü")])
        shard.append_judgement("j", [("a", 1), ("b", 1)], [_verdict("a")])
        return shard.path


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    _fill(tmp_path)
    saved = read_shards(tmp_path)
    assert list(saved.responses.values()) == [_response("a"), _response("b", "line\nbreak \u2028 ü")]
    assert saved.judged == {"j": {("a", 1), ("b", 1)}}
    assert saved.verdicts == [_verdict("a")]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    assert stat.S_IMODE(_fill(tmp_path).stat().st_mode) == 0o600


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_tail_torn_anywhere_costs_only_its_own_line(tmp_path: Path, data: st.DataObject) -> None:
    path = _fill(tmp_path)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    rubbish = data.draw(st.sampled_from([b"", b"\x00" * 7, b"\x00\n\x00\n", b'{"resp']))
    path.write_bytes(whole[:cut] + rubbish)
    with ShardWriter(tmp_path) as shard:
        assert path.read_bytes()[-1:] in (b"", b"\n")
        shard.append_responses([_response("c")])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        saved = read_shards(tmp_path)
    num_whole = whole[:cut].count(b"\n")
    assert [sample for sample, _ in saved.responses] == [*"ab"[:num_whole], "c"]
    assert bool(saved.verdicts) == (num_whole == 3)
    assert bool(said) == (b"\n" in rubbish)
    path.unlink()


def _edit(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))


def test_an_edited_answer_does_not_count(tmp_path: Path) -> None:
    _edit(_fill(tmp_path), b'"text": "t"', b'"text": "T"')
    with pytest.warns(RuntimeWarning, match="1 line is damaged or from another run; that work will be redone"):
        saved = read_shards(tmp_path)
    assert list(saved.responses) == [("b", 1)]
    assert saved.judged == {"j": {("b", 1)}}  # nor does what was said of it
    assert saved.verdicts == []


def test_lines_of_another_run_do_not_count(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, run_key="other") as shard:
        shard.append_responses([_response("a")])
    with pytest.warns(RuntimeWarning, match="from another run"):
        assert read_shards(tmp_path, run_key="this").responses == {}
    assert list(read_shards(tmp_path, run_key="other").responses) == [("a", 1)]


RESPONSE: dict[str, Any] = vars(_response("a"))
VERDICT: dict[str, Any] = vars(_verdict("a"))
WORD = {"judge": "j", "key": "", "rows": [["a", 1]], "verdicts": [VERDICT]}


@pytest.mark.parametrize(
    "record",
    [
        {"response": None},
        {"response": {**RESPONSE, "exit_layer": "1"}},
        {"response": {name: value for name, value in RESPONSE.items() if name != "text"}},
        {"response": {**RESPONSE, "seconds": math.inf}},
        {"response": [RESPONSE]},
        WORD | {"verdicts": [VERDICT | {"score": 7.0}]},
        WORD | {"verdicts": [VERDICT | {"score": None}]},
        WORD | {"verdicts": [VERDICT | {"measure": "wit"}]},
        WORD | {"verdicts": [VERDICT, VERDICT]},
        WORD | {"verdicts": [VERDICT | {"sample_id": "z"}]},
        WORD | {"verdicts": [VERDICT | {"judge": "k"}]},
        WORD | {"rows": None},
        {"response": RESPONSE | {"text": "deep"}, "more": "DEEP"},
    ],
    ids=str,
)
def test_a_line_that_no_audit_wrote_does_not_count(tmp_path: Path, record: dict[str, Any]) -> None:
    """Even with a checksum: whoever edits a shard may know how to make one."""
    body = json.dumps(record).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()[1:]
    (tmp_path / "00000.jsonl").write_bytes(shards._OPENING % shards._checksum(body, "") + body + b"\n")
    with pytest.warns(RuntimeWarning, match="1 line is damaged"):
        saved = read_shards(tmp_path)
    assert (saved.responses, saved.judged, saved.verdicts) == ({}, {}, [])


@pytest.mark.parametrize("what", ["folder", "link", "pipe"])
def test_something_else_in_the_place_of_a_shard_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "00000.jsonl"
    {"folder": path.mkdir, "link": lambda: path.symlink_to("/etc/hostname"), "pipe": lambda: os.mkfifo(path)}[what]()
    words = "was not written by an audit; remove it and rerun|is a symbolic link"
    for use in (lambda: ShardWriter(tmp_path), lambda: read_shards(tmp_path)):
        with pytest.raises(RunError, match=words):
            use()


def test_shards_of_several_processes_add_up_and_the_first_word_counts(tmp_path: Path) -> None:
    _fill(tmp_path)
    with ShardWriter(tmp_path, process=1) as shard:
        shard.append_responses([_response("a", "again"), _response("c")])
        shard.append_judgement("j", [("a", 1), ("c", 1)], [_verdict("a", 0.0), _verdict("c", 0.0)])
    saved = read_shards(tmp_path)
    assert [response.text for response in saved.responses.values()] == ["t", "line\nbreak \u2028 ü", "t"]
    assert saved.verdicts == [_verdict("a"), _verdict("c", 0.0)]


def test_a_shard_has_one_writer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path), pytest.raises(RunError, match="is being written by another process"):
        ShardWriter(tmp_path)
    ShardWriter(tmp_path).close()


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with ShardWriter(tmp_path) as shard:
        monkeypatch.setattr("exitsafe.store.shards.os.fsync", full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); make room"):
            shard.append_responses([_response("c")])
        monkeypatch.undo()
        shard.append_responses([_response("d")])  # on a line of its own
    assert {sample_id for sample_id, _ in read_shards(tmp_path).responses} == {"a", "b", "d"}


@pytest.mark.parametrize("link", ("shards/00000.jsonl", "shards"))
def test_a_run_is_not_written_through_a_symbolic_link(link: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    target = mine / "00000.jsonl" if link == "shards" else mine / "notes.txt"
    mine.mkdir()
    target.write_text("not a shard")
    place = tmp_path / "run" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(mine if link == "shards" else target)
    with pytest.raises(RunError, match="is a symbolic link, and exitsafe does not write through links"):
        ShardWriter(tmp_path / "run" / "shards")
    assert target.read_text() == "not a shard"
