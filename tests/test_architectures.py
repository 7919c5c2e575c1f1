"""The tiny models of `tests/architectures.py` run in stock transformers, and what they see changes what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures import NOT_RUN, Tiny, model_types, parametrized, tiny, tiny_inputs


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def check_sees(model: Tiny, modality: str) -> None:
    """The logits after a prompt depend on what the encoder gets; another prompt may have another length."""
    known = logits(model.model, model.inputs)
    other = tiny_inputs(model.model, seed=1, num_words=9, modality=modality)
    pixels = {name: other[name] for name in model.image_inputs}
    seen = logits(model.model, model.inputs | pixels)
    assert not known.isnan().any()
    assert (known[:, -1] - seen[:, -1]).abs().max() > 1e-3
    assert other["input_ids"].shape[1] == model.inputs["input_ids"].shape[1] + 4
    assert not logits(model.model, other).isnan().any()


@pytest.mark.parametrize("model_type", parametrized(name for name in model_types() if name not in NOT_RUN))
def test_pictures_change_the_logits(model_type: str) -> None:
    check_sees(tiny(model_type), "image")


@pytest.mark.parametrize("model_type", parametrized(NOT_RUN))
def test_the_others_fail_as_listed(model_type: str) -> None:
    with pytest.raises((AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)) as error:
        check_sees(tiny(model_type), "image")
    assert NOT_RUN[model_type] in str(error.value)


@pytest.mark.parametrize("model_type", ["llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl"])
def test_videos_change_the_logits(model_type: str) -> None:
    check_sees(tiny(model_type, modality="video"), "video")


@pytest.mark.parametrize("model_type", ["glmasr", "qwen2_5_omni_thinker", "qwen2_audio", "voxtral"])
def test_sounds_change_the_logits(model_type: str) -> None:
    check_sees(tiny(model_type, modality="audio"), "audio")


def test_a_seed_decides_everything() -> None:
    first, again, other = (tiny("qwen3_vl", seed) for seed in (0, 0, 1))
    assert torch.equal(logits(first.model, first.inputs), logits(again.model, again.inputs))
    assert not torch.equal(logits(first.model, first.inputs), logits(other.model, first.inputs))
