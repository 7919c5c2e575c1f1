"""The training folder: same settings go on, others are refused with the difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitsafe.errors import RunError
from exitsafe.lppo.folder import METRICS, TrainingFolder

SETTINGS = {"config": {"seed": 0, "mix": {"vqa": 1.0}, "exit_layers": (1, 2)}, "reward": "mine"}
SIZES = {"microbatch_tokens": 100}


def test_the_same_settings_go_on_and_changed_ones_are_refused_with_the_difference(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    TrainingFolder.open(out, SETTINGS, SIZES)
    before = (out / "run.json").read_bytes()
    TrainingFolder.open(out, SETTINGS, SIZES)
    assert (out / "run.json").read_bytes() == before
    assert "torch" in json.loads(before)["versions"]
    TrainingFolder.open(out, SETTINGS, {"microbatch_tokens": 50})  # out of memory: goes on in smaller parts
    changed = {**SETTINGS, "config": {"seed": 1, "mix": {"vqa": 1.0}, "exit_layers": (1, 2)}}
    with pytest.raises(RunError, match=r"other settings \(config.seed was 0, is now 1\)"):
        TrainingFolder.open(out, changed, SIZES)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a training run: choose a new or empty folder"):
        TrainingFolder.open(tmp_path, SETTINGS, SIZES)
    with pytest.raises(RunError, match="is not a training run: choose a new or empty folder"):
        TrainingFolder.open(tmp_path / "notes.txt", SETTINGS, SIZES)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match="not a training run's record"):
        TrainingFolder.open(tmp_path, SETTINGS, SIZES)


def test_metrics_of_steps_to_be_redone_are_dropped_and_a_truncated_line(tmp_path: Path) -> None:
    folder = TrainingFolder.open(tmp_path / "run", SETTINGS, SIZES)
    for step in range(3):
        folder.append(METRICS, {"step": step})
    with (folder.path / "metrics.jsonl").open("a") as lines:
        lines.write('{"st')
    folder.drop_lines_from(2)
    folder.append(METRICS, {"step": 2})
    lines_now = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines_now] == [0, 1, 2]


def test_the_adapter_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = TrainingFolder.open(tmp_path / "run", SETTINGS, SIZES)

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save_adapter(fail)
    assert not folder.adapter.exists()
    folder.save_adapter(lambda path: path.mkdir())
    assert folder.is_finished
    assert list(folder.adapter.iterdir()) == []


def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    folder = TrainingFolder.open(tmp_path, SETTINGS, SIZES)
    with folder.locked(), pytest.raises(RunError, match="being written by another process"), folder.locked():
        pass
    with folder.locked():
        pass


def test_what_a_kill_in_the_first_write_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".run.json.part").write_text('{"sett')
    TrainingFolder.open(tmp_path, SETTINGS, SIZES)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["reward"] == "mine"
