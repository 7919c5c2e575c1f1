"""bfloat16 weights under float32 training: what is trained and what is measured keep their precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.lppo import align
from exitsafe.lppo.policy import attached_policy
from exitsafe.lppo.update import Learner
from exitsafe.records import Sample
from tests.lppo.conftest import make_vlm, tiny_config
from tests.lppo.test_policy import RESPONSES, perturb, rows_at


@pytest.fixture
def half() -> VLM:
    vlm = make_vlm("llava")
    vlm.model.to(torch.bfloat16)
    return vlm


def test_lora_head_gradients_and_optimiser_are_float32(half: VLM, samples: list[Sample]) -> None:
    with attached_policy(half, tiny_config()) as policy:
        perturb(policy)
        learner = Learner(policy, tiny_config())
        rows = rows_at(half, samples[1:4], [1, 3, 6])
        now = policy.evaluate(rows, RESPONSES[:3])
        for tensor in (now.logprobs, now.values, now.entropy):
            assert tensor.dtype == torch.float32
        (now.logprobs.sum() + now.values.sum()).backward()
        learner.optimizer.step()
        trained = [*policy.weights().values(), *policy.value_head.parameters()]
        assert all(weight.dtype == torch.float32 for weight in trained)
        assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in trained)
        moments = [tensor for state in learner.optimizer.state.values() for tensor in state.values()]
        assert len(moments) == 3 * len(policy.weights())
        assert all(tensor.dtype == torch.float32 for tensor in moments)
        frozen = {name: weight for name, weight in half.base_model.named_parameters() if not weight.requires_grad}
        assert {weight.dtype for weight in frozen.values()} == {torch.bfloat16}


def test_an_update_smaller_than_bfloat16_can_hold_is_kept(half: VLM) -> None:
    with attached_policy(half, tiny_config()) as policy:
        weight = next(weight for name, weight in policy.weights().items() if "lora_A" in name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(before, alpha=1e-4)  # bfloat16 has steps of 0.4 to 0.8%
        assert not torch.equal(weight, before)


def test_float16_is_refused_by_name_of_what_to_take(samples: list[Sample], tmp_path: Path) -> None:
    vlm = make_vlm("llava")
    vlm.model.to(torch.float16)
    with pytest.raises(InputError, match=r"float16 weights.*--dtype bfloat16"):
        align(vlm, samples, config=tiny_config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
