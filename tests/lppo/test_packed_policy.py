"""Packed groups in the policy: the numbers and gradients of separate sequences, and a ratio of exactly 1."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from exitsafe.engine.packing import sibling_groups
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig, align
from exitsafe.lppo.logprobs import measure
from exitsafe.lppo.minibatches import Batch, deal
from exitsafe.lppo.policy import Policy, attached_policy, pack_size
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, make_vlm, tiny_config
from tests.lppo.test_policy import perturb, rows_at

RESPONSES = [
    torch.tensor(ids)
    for ids in ([12, 13, 2], [14], [20, 11, 12, 13, 15], [9, 2], [9, 10, 11, 12], [11], [24, 22, 21], [10, 12])
]
FAMILIES = ("llava", "llava-siglip", "llava_next", "mllama")


def grouped_rows(vlm: VLM, samples: list[Sample]) -> list[Row]:
    """Three groups at three exits, of 4, 3 and 1: answers of two groups were left out."""
    with_images = [sample for sample in samples if sample.images]
    first, second, third = rows_at(vlm, [with_images[0], with_images[2], with_images[5]], [1, 5, 3])
    return [first] * 4 + [second] * 3 + [third]


def gradients(policy: Policy, rows: list[Row], places: list[list[int]]) -> dict[str, torch.Tensor]:
    """Of a sum over all log-probabilities and values, evaluated in the given parts."""
    for part in places:
        now = policy.evaluate([rows[i] for i in part], [RESPONSES[i] for i in part])
        weights = torch.tensor([1.0 + i for i in part])[:, None]
        ((now.logprobs + 0.5 * now.values**2) * weights).sum().backward()
    found = {name: weight.grad.clone() for name, weight in policy.weights().items() if weight.grad is not None}
    for name, parameter in policy.value_head.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    for weight in (*policy.weights().values(), *policy.value_head.parameters()):
        weight.grad = None
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_packed_and_separate_agree_in_all_outputs_and_all_gradients(
    samples: list[Sample], family: str, train: str
) -> None:
    vlm = make_vlm(family)
    rows = grouped_rows(vlm, samples)
    config = tiny_config(group_size=4, train=train, temperature=0.7)
    with attached_policy(vlm, config) as policy:
        perturb(policy)
        torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
        assert policy.pack_size == 4
        with torch.no_grad():
            packed = policy.evaluate(rows, RESPONSES)
            with policy.as_reference():
                packed_reference = policy.evaluate(rows, RESPONSES)
        found = gradients(policy, rows, [list(range(8))])
        policy.pack_size = 1
        for place, (row, response) in enumerate(zip(rows, RESPONSES, strict=True)):
            with torch.no_grad():
                alone = policy.evaluate([row], [response])
                with policy.as_reference():
                    reference = policy.evaluate([row], [response])
            shown = packed.mask[place]
            assert int(shown.sum()) == len(response)
            for name in ("logprobs", "values", "entropy"):
                assert torch.allclose(getattr(packed, name)[place, shown], getattr(alone, name)[0], atol=2e-5), name
                assert (getattr(packed, name)[place, ~shown] == 0).all()
            assert torch.allclose(packed_reference.logprobs[place, shown], reference.logprobs[0], atol=2e-5)
        assert not torch.allclose(packed.logprobs, packed_reference.logprobs, atol=1e-2)
        wanted = gradients(policy, rows, [[place] for place in range(8)])
        assert wanted.keys() == found.keys()
        trained = [name for name, gradient in wanted.items() if gradient.abs().max() > 1e-4]
        assert len(trained) > 0.8 * len(wanted)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-6), name


def test_logits_are_made_at_response_positions_only(vlm: VLM, samples: list[Sample]) -> None:
    rows = grouped_rows(vlm, samples)
    sizes: list[torch.Size] = []
    assert vlm.has_plain_head  # found out once, by running it
    with attached_policy(vlm, tiny_config(group_size=4)) as policy:
        handle = vlm.base_model.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
        policy.evaluate(rows, RESPONSES)
        handle.remove()
    assert sizes == [(8, 5, vlm.text_config.hidden_size)]


def test_recomputed_blocks_give_the_same_gradients(vlm: VLM, samples: list[Sample]) -> None:
    rows = grouped_rows(vlm, samples)
    found = []
    for recompute in (False, True):
        config = tiny_config(group_size=4, gradient_checkpointing=recompute)
        with attached_policy(vlm, config) as policy:
            perturb(policy)
            found.append(gradients(policy, rows, [list(range(8))]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def dealt(vlm: VLM, samples: list[Sample], config: LPPOConfig, *, seed: int = 0) -> Batch:
    return deal(vlm, grouped_rows(vlm, samples), RESPONSES, config=config, rng=np.random.default_rng(seed))


def test_a_dealt_group_is_one_sequence(vlm: VLM, samples: list[Sample]) -> None:
    for seed in range(4):
        batch = dealt(vlm, samples, tiny_config(group_size=4, microbatch_tokens=200), seed=seed)
        parts = [part for minibatch in batch.minibatches for part in minibatch]
        sequences = [sequence for part in parts for sequence in sibling_groups([batch.rows[i] for i in part], 4)]
        assert sorted(map(len, sequences)) == [1, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_before_the_first_update_is_exactly_1(samples: list[Sample], family: str) -> None:
    vlm = make_vlm(family)
    config = tiny_config(group_size=4, microbatch_tokens=60)
    batch = dealt(vlm, samples, config)
    parts = [part for minibatch in batch.minibatches for part in minibatch]
    assert max(len(part) for part in parts) > 1
    with attached_policy(vlm, config) as policy:
        perturb(policy)
        measured = measure(policy, batch)
        for part in parts:
            now = policy.evaluate([batch.rows[i] for i in part], [batch.responses[i] for i in part])
            width = now.mask.shape[1]
            assert torch.equal(now.logprobs, measured.logprobs[part, :width])
            assert torch.equal(now.values, measured.values[part, :width])


def test_a_group_too_long_for_a_microbatch_is_cut_and_stays_exact(vlm: VLM, samples: list[Sample]) -> None:
    whole, cut = tiny_config(group_size=4, microbatch_tokens=200), tiny_config(group_size=4, microbatch_tokens=20)
    batches = [dealt(vlm, samples, config) for config in (whole, cut)]
    num_parts = [sum(len(minibatch) for minibatch in batch.minibatches) for batch in batches]
    assert num_parts[0] < num_parts[1]
    with attached_policy(vlm, whole) as policy:
        perturb(policy)
        one, other = (measure(policy, batch) for batch in batches)
    assert torch.allclose(one.logprobs, other.logprobs, atol=2e-5)
    assert torch.allclose(one.entropy, other.entropy, atol=2e-5)


def test_in_bfloat16_packing_moves_log_probabilities_no_more_than_batching_does(
    vlm: VLM, samples: list[Sample]
) -> None:
    """Nothing is exact in bfloat16: the measure is what is lost against float32 by separate sequences."""
    rows = grouped_rows(vlm, samples)
    config = tiny_config(group_size=4)

    def logprobs(pack: int) -> torch.Tensor:
        with attached_policy(vlm, config) as policy, torch.no_grad():
            policy.pack_size = pack
            return policy.evaluate(rows, RESPONSES).logprobs

    exact = logprobs(1)
    vlm.model.to(torch.bfloat16)
    apart, packed = logprobs(1), logprobs(4)
    assert packed.dtype == torch.float32
    lost = (apart - exact).abs().max()
    assert lost > 1e-3
    assert (packed - exact).abs().max() < 2 * lost


def run_metrics(samples: list[Sample], config: LPPOConfig, out: Path) -> list[dict[str, float]]:
    align(make_vlm("llava"), samples, reward=count_red, config=config, out=out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_run_follows_the_same_curve_as_a_separate_one(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(num_steps=3, group_size=4, microbatch_tokens=200, learning_rate=1e-3)
    packed = run_metrics(samples, config, tmp_path / "packed")
    monkeypatch.setattr(VLM, "can_pack", False)
    assert pack_size(make_vlm("llava"), config) == 1
    apart = run_metrics(samples, config, tmp_path / "apart")
    # with minibatches of 4 and groups of 4, but dealt row by row, only the first step's measures are comparable
    for name in ("reward", "kl", "entropy", "num_tokens"):
        assert packed[0][name] == pytest.approx(apart[0][name], abs=1e-4), name
    assert packed[0]["ratio"] == 1.0  # the head alone learns in the first step
    assert [step["skipped_minibatches"] for step in packed] == [0, 0, 0]
