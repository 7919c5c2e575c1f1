"""Checkpoints: the newest whole one comes back, torn ones are passed over with a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def save(folder: Path, step: int, *, keep: int = 2) -> None:
    save_checkpoint(folder, step, {"weights": torch.full((3,), float(step)), "kl_coef": 0.1}, keep=keep)


def test_the_newest_comes_back_and_only_so_many_are_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "c", CPU) is None
    for step in (5, 10, 100):
        save(tmp_path / "c", step)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000010.ckpt", "step-000100.ckpt"]
    found = load_checkpoint(tmp_path / "c", CPU)
    assert found is not None
    step, state = found
    assert step == 100
    assert state["weights"].tolist() == [100.0] * 3
    assert state["kl_coef"] == 0.1


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_torn_checkpoint_is_passed_over_with_a_word(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    newest = tmp_path / "step-000010.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": bytes(content[:-7]), "empty": b"", "flipped": bytes(content)}[damage])
    with pytest.warns(RuntimeWarning, match=r"step-000010\.ckpt is truncated or corrupt"):
        found = load_checkpoint(tmp_path, CPU)
    assert found is not None
    assert found[0] == 5


def test_an_unfinished_write_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / ".step-000010.ckpt.part").write_bytes(b"half")
    found = load_checkpoint(tmp_path, CPU)
    assert found is not None
    assert found[0] == 5
