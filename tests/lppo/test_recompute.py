"""Gradient checkpointing: the same numbers and gradients from less memory, and no trace outside the passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from exitsafe.engine.vlm import VLM
from exitsafe.lppo.policy import attached_policy, recomputed_blocks
from exitsafe.records import Sample
from tests.lppo.conftest import make_vlm, tiny_config
from tests.lppo.test_policy import RESPONSES, perturb, rows_at


@contextmanager
def counting_saved_bytes() -> Iterator[list[int]]:
    """Bytes of the distinct tensors that the passes inside keep for backward."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))


def update_pass(family: str, samples: list[Sample], **changes: Any) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, log-probabilities and saved bytes of one pass."""
    vlm = make_vlm(family)
    with attached_policy(vlm, tiny_config(**changes)) as policy:
        perturb(policy)
        rows = rows_at(vlm, [sample for sample in samples if sample.images][:4], [1, 3, 5, 6])
        with counting_saved_bytes() as saved:
            logprobs = policy.evaluate(rows, RESPONSES).logprobs
        logprobs.sum().backward()
        gradients = {name: weight.grad.clone() for name, weight in policy.weights().items() if weight.grad is not None}
        return gradients, logprobs.detach(), saved[0]


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradients_are_the_same_from_less_memory(family: str, train: str, samples: list[Sample]) -> None:
    kept, logprobs, bytes_kept = update_pass(family, samples, train=train)
    again, same_logprobs, bytes_again = update_pass(family, samples, train=train, gradient_checkpointing=True)
    assert torch.equal(logprobs, same_logprobs)
    assert kept.keys() == again.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in kept.values())
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
    assert bytes_again < 0.6 * bytes_kept


def test_every_block_computes_twice_and_only_with_gradient(vlm: VLM, samples: list[Sample]) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with attached_policy(vlm, tiny_config(gradient_checkpointing=True)) as policy:
        blocks = vlm.base_model.model.language_model.layers
        for block in blocks:
            block.self_attn.register_forward_hook(count)
        rows = rows_at(vlm, samples[1:3], [2, 6])
        evaluation = policy.evaluate(rows, RESPONSES[:2])
        assert calls == len(blocks)
        evaluation.logprobs.sum().backward()
        assert calls == 2 * len(blocks)
        with torch.no_grad():
            policy.evaluate(rows, RESPONSES[:2])
        assert calls == 3 * len(blocks)
        assert not any("forward" in block.__dict__ for block in blocks)


def test_blocks_are_given_back_after_an_error(vlm: VLM) -> None:
    language_model = vlm.model.model.language_model
    with pytest.raises(KeyboardInterrupt), recomputed_blocks(language_model):
        assert all("forward" in layer.__dict__ for layer in language_model.layers)
        raise KeyboardInterrupt
    assert not any("forward" in layer.__dict__ for layer in language_model.layers)
