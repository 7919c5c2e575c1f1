"""The self-check refuses a model that our loop would answer for otherwise than `generate`, and is made once."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from exitsafe.engine.checks import run_checks
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError
from exitsafe.exits.checks import Checks
from exitsafe.records import Sample
from tests.engine.test_generation import complete, rows_of, stock_answer
from tests.tiny_models import save_tiny, tiny_llava, tiny_processor


def checked(model: Any) -> tuple[VLM, Checks]:
    vlm = VLM(model, tiny_processor("llava"), name="tiny")
    return vlm, run_checks(vlm, since=time.perf_counter())


def changed(owner: Any, name: str, change: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Let a method return `change` of what it returns and of its keyword arguments."""
    method = getattr(owner, name)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return change(method(*args, **kwargs), kwargs)

    setattr(owner, name, call)


def scaled(outputs: Any, kwargs: dict[str, Any]) -> Any:
    outputs.logits = outputs.logits * 0.5
    return outputs


def test_a_sound_model_differs_by_rounding_alone(vlm: VLM) -> None:
    checks = run_checks(vlm, since=time.perf_counter())
    assert checks.encoder == vlm.encoder and checks.can_pad
    assert checks.exits == (vlm.default_exit, 3)
    assert max(checks.alone, checks.mixed, checks.training) < 1e-5


def test_a_model_that_scales_its_logits_is_not_refused(samples: list[Sample]) -> None:
    model = tiny_llava()
    changed(model, "forward", scaled)
    vlm, checks = checked(model)
    assert checks.training < 1e-5 and not vlm.has_plain_head


def other_positions(model: Any) -> None:
    """Positions that depend on what `generate` alone hands over."""

    def stretch(inputs: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if "next_sequence_length" in kwargs:
            inputs["position_ids"] = inputs["position_ids"] * 2
        return inputs

    changed(model, "prepare_inputs_for_generation", stretch)


def another_training_pass(model: Any) -> None:
    def shift(outputs: Any, kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("use_cache"):
            outputs.last_hidden_state = outputs.last_hidden_state.roll(1, dims=-1)
        return outputs

    changed(model.model, "forward", shift)


def what_the_loop_cannot_run(model: Any) -> None:
    def fail(inputs: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        return inputs if "next_sequence_length" in kwargs else inputs | {"pixel_values": torch.zeros(0)}

    changed(model, "prepare_inputs_for_generation", fail)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_positions, r"tiny fails the check of generation: logits differ from those of transformers' generate by"),
        (another_training_pass, "tiny fails the check of training: logits differ"),
        (what_the_loop_cannot_run, r"tiny fails the check of generation: exitsafe's loop cannot run it \(\w+Error: "),
    ],
)
def test_a_broken_model_is_refused_by_the_name_of_the_check(damage: Callable[[Any], None], message: str) -> None:
    model = tiny_llava()
    damage(model)
    with pytest.raises(ModelError, match=message) as refusal:
        checked(model)
    assert "\n" not in str(refusal.value)


def test_a_cache_that_mixes_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(DynamicLayer):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(*args, **kwargs)
            return keys, values.mean(dim=0, keepdim=True).expand_as(values)

    def mixed(config: Any) -> DynamicCache:
        cache = DynamicCache(config=config)
        cache.layers = [Mixed() for _ in cache.layers]
        return cache

    monkeypatch.setattr("exitsafe.engine.generation.growing_cache", mixed)
    with pytest.raises(ModelError, match="tiny fails the check of mixed batches: logits differ"):
        checked(tiny_llava())


def test_a_model_that_cannot_be_padded_answers_prompts_of_one_length_at_a_time(samples: list[Sample]) -> None:
    model = tiny_llava()

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, cache = kwargs["inputs_embeds"], kwargs["past_key_values"]
        places = torch.arange(embeds.shape[1]) + (0 if cache is None else cache.get_seq_length())  # padding counts
        return args, kwargs | {"inputs_embeds": embeds + 0.3 * places[:, None]}

    model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    vlm, checks = checked(model)
    assert not checks.can_pad
    many, exits = samples * 2, [1, 2, 3, 4, 5, 6, 1] * 2
    answers = complete(vlm, rows_of(vlm, many, exits), batch_size=4, max_new_tokens=5)
    assert [list(answer) for answer in answers] == [
        stock_answer(vlm, *pair, max_new_tokens=5) for pair in zip(many, exits, strict=True)
    ]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[VLM]:
    """The models that are checked, with a cache of this test's own."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    models: list[VLM] = []

    def count(vlm: VLM, *, since: float) -> Checks:
        models.append(vlm)
        return run_checks(vlm, since=since)

    monkeypatch.setattr("exitsafe.engine.load.run_checks", count)
    return models


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "exitsafe" / "checks").iterdir())


def test_a_checkpoint_is_checked_once(counted: list[VLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    first, second = load_vlm(folder), load_vlm(folder)
    assert len(counted) == 1
    assert second.checks == first.checks and second.encoder == first.encoder
    (file,) = kept(tmp_path)
    kept_text = file.read_text()
    damages = (
        "",
        "[]",
        "3",
        kept_text.replace("can_pad", "can_fly"),
        kept_text.replace('"num_layers": 6', '"num_layers": "6"'),
        kept_text.replace('"default_exit": 5', '"default_exit": 7'),
        kept_text.replace("vision_tower", "tower"),
    )
    for damaged in damages:
        assert damaged != kept_text
        file.write_text(damaged)
        load_vlm(folder)
        assert load_vlm(folder).checks == first.checks
    assert len(counted) == 1 + len(damages)
    monkeypatch.setattr("exitsafe.engine.checks.transformers.__version__", "0.0")
    load_vlm(folder)
    load_vlm(folder, dtype="bfloat16")
    assert len(counted) == 3 + len(damages) and len(kept(tmp_path)) == 3


def test_weights_that_nothing_identifies_are_always_checked(
    counted: list[VLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.engine.load.hash_files", lambda folder: None)
    folder = save_tiny("llava", tmp_path / "model")
    load_vlm(folder)
    load_vlm(folder)
    assert len(counted) == 2 and not (tmp_path / "home").exists()


def test_a_model_is_not_asked_what_was_kept(counted: list[VLM], tmp_path: Path) -> None:
    """Another checkpoint is another key, and a cache that cannot be written stops nobody."""
    (tmp_path / "home").write_text("a file")
    load_vlm(save_tiny("llava", tmp_path / "model"))
    load_vlm(tmp_path / "model")
    assert len(counted) == 2
