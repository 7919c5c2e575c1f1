from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.runs.shards import ShardWriter, read_shards


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
        num_whole = whole[:cut].count(b"\n")
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:num_whole])
        shard.append_responses([_response("c")])
    assert read_shards(tmp_path).responses["c", 1] == _response("c")
    path.unlink()


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
        monkeypatch.setattr("exitsafe.runs.shards.os.fsync", full)
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
    with pytest.raises(RunError, match="is a symbolic link, and is not written through"):
        ShardWriter(tmp_path / "run" / "shards")
    assert target.read_text() == "not a shard"
