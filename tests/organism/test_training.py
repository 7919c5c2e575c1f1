"""Training: steps change what they may change, the seed decides all, and what is stored is what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from exitsafe.errors import InputError
from exitsafe.organism.__main__ import main
from exitsafe.organism.architecture import build_model, build_processor
from exitsafe.organism.stages import Stage, curriculum
from exitsafe.organism.training import run_stages, save_organism, train_organism

TOKENIZER = build_processor().tokenizer


def short(name: str = "organism", steps: int = 3) -> tuple[Stage, ...]:
    """Every stage of the curriculum, a few small steps each."""
    return tuple(replace(stage, steps=steps, batch_size=8) for stage in curriculum(name))


def trained(stages: tuple[Stage, ...], *, seed: int = 0) -> LlavaForConditionalGeneration:
    model = build_model(seed=seed)
    run_stages(model, TOKENIZER, stages, seed=seed)
    return model


def changed(before: LlavaForConditionalGeneration, after: LlavaForConditionalGeneration) -> set[str]:
    first, second = before.state_dict(), after.state_dict()
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_a_few_steps_change_the_weights_and_the_seed_decides_how() -> None:
    first, again, other = (trained(short()[:1], seed=seed) for seed in (0, 0, 1))
    assert changed(build_model(seed=0), first)
    assert not changed(first, again)
    assert changed(first, other)


def test_stages_started_from_a_copy_end_where_an_uninterrupted_run_ends() -> None:
    stages = short()
    whole = trained(stages)
    model = trained(stages[:3])
    run_stages(model, TOKENIZER, stages, seed=0, first=3)
    assert not changed(whole, model)


def test_safety_stages_leave_early_exits_and_the_projector_alone() -> None:
    model = build_model(seed=0)
    early, late = short()[4:]
    run_stages(model, TOKENIZER, (early,), seed=0)
    moved = changed(build_model(seed=0), model)
    assert moved
    assert all("encoder.layers.5." in name or "encoder.layers.6." in name for name in moved)
    run_stages(model, TOKENIZER, (late,), seed=0)
    moved = changed(build_model(seed=0), model)
    assert any("language_model" in name for name in moved)
    assert not any("projector" in name or "encoder.layers.4." in name for name in moved)


def test_loss_falls() -> None:
    notes: list[str] = []
    stages = (replace(curriculum("organism")[0], steps=25, batch_size=32),)
    run_stages(build_model(seed=0), TOKENIZER, stages, seed=0, progress=lambda done, total, note: notes.append(note))
    losses = [float(note.rsplit(" ", 1)[1]) for note in notes]
    assert len(losses) == 25
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_stored_weights_are_rounded_and_load_as_float32(tmp_path: Path) -> None:
    model = build_model(seed=0)
    save_organism(model, tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    assert (tmp_path / "model.safetensors").stat().st_size < 2_500_000
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.to(torch.bfloat16).float(), again.state_dict()[name]), name


def test_used_folder_and_unknown_name_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="choose a new folder"):
        train_organism("organism", out=tmp_path)
    with pytest.raises(InputError, match="choose organism or organism:text"):
        train_organism("organism:audio", out=tmp_path / "new")


def test_the_module_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("exitsafe.organism.training.train_organism", lambda name, **how: asked.update(how) or tmp_path)
    assert main(["organism:text", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert (asked["seed"], asked["out"], capsys.readouterr().out) == (3, tmp_path, f"{tmp_path}\n")
    monkeypatch.undo()
    assert main(["garden", "--out", str(tmp_path / "new")]) == 2
    assert "organism 'garden' is unknown" in capsys.readouterr().err
