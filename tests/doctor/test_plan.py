"""The plan against what is used: weights, LoRA, optimiser, cache and features exactly, activations within 8%."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exitsafe.doctor import Blueprint, Plan, align_plan, audit_plan, load_blueprint, typical_prompt
from exitsafe.doctor.blueprint import weights_of
from exitsafe.doctor.plan import keeping_count
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.policy import Policy, attached_policy
from exitsafe.lppo.update import Learner
from exitsafe.records import Sample
from exitsafe.vlm import VLM, Row, load_vlm
from exitsafe.vlm.prompts import collate
from tests.lppo.conftest import tiny_config
from tests.tiny_models import noise_image, save_tiny

FAMILIES = ("llava", "llava_next", "mllama")
NUM_ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, path / family) for family in FAMILIES}


@pytest.fixture
def samples() -> list[Sample]:
    """All alike, so that the longest prompt is every prompt."""
    picture = noise_image(1, (56, 56))
    return [Sample(id=f"s{i}", prompt="what colour is the shape", images=(picture,), kind="benign") for i in range(6)]


def bytes_of(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


def part(plan: Plan, name: str) -> int:
    found = [each.bytes for each in (*plan.device, *plan.host) if each.name == name]
    assert len(found) == 1
    return found[0]


def settings(**changes: Any) -> LPPOConfig:
    return tiny_config(**{"microbatch_tokens": 10_000, "max_new_tokens": NUM_ANSWER_TOKENS, **changes})


def rows_of(vlm: VLM, samples: Sequence[Sample]) -> list[Row]:
    return FeatureStore(vlm, samples, [5], max_bytes=1e9).rows(list(range(len(samples))), [5] * len(samples))


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[Blueprint, VLM]]:
    yield load_blueprint(folders[request.param]), load_vlm(folders[request.param], device="cpu")


def test_weights(pair: tuple[Blueprint, VLM]) -> None:
    blueprint, vlm = pair
    assert weights_of(blueprint).total == bytes_of(vlm.model)
    assert min(vars(weights_of(blueprint)).values()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(folders: dict[str, Path], dtype: str) -> None:
    planned = weights_of(load_blueprint(folders["llava"], dtype=dtype)).total
    assert planned == bytes_of(load_vlm(folders["llava"], dtype=dtype, device="cpu").model)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_quantised_weights(folders: dict[str, Path], quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    vlm = load_vlm(folders["llava"], quantization=quantization, device="cpu")
    used = bytes_of(vlm.model)
    for module in vlm.model.modules():
        weight: Any = getattr(module, "weight", None)
        if quantization == "nf4" and hasattr(weight, "quant_state"):
            used += weight.quant_state.absmax.nbytes + weight.quant_state.code.nbytes
        elif quantization == "int8" and getattr(weight, "SCB", None) is not None:
            used += weight.SCB.nbytes
    assert weights_of(load_blueprint(folders["llava"], quantization=quantization)).total == used
    assert used < bytes_of(load_vlm(folders["llava"], device="cpu").model)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_trained_weights_gradients_and_optimiser(
    pair: tuple[Blueprint, VLM], samples: list[Sample], train: str
) -> None:
    blueprint, vlm = pair
    config = settings(train=train)
    typical = typical_prompt(blueprint, samples)
    plan = align_plan(blueprint, typical, exit_layers=(5,), num_samples=6, config=config)
    with attached_policy(vlm, config) as policy:
        learner = Learner(policy, config)
        now = policy.evaluate(rows_of(vlm, samples[:2]), [torch.tensor([12, 13])] * 2)
        (now.logprobs.sum() + now.values.sum()).backward()
        trained = [*learner.weights, *learner.head_weights]
        for weight in trained:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        learner.optimizer.step()
        learner.value_optimizer.step()
        states = [*learner.optimizer.state.values(), *learner.value_optimizer.state.values()]
        assert part(plan, "trained weights") == sum(weight.nbytes for weight in learner.weights)
        assert part(plan, "value head") == sum(weight.nbytes for weight in learner.head_weights)
        assert part(plan, "gradients") == sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
        assert part(plan, "optimiser") == sum(tensor.nbytes for state in states for tensor in state.values())


def test_cache(pair: tuple[Blueprint, VLM], samples: list[Sample]) -> None:
    blueprint, vlm = pair
    typical = typical_prompt(blueprint, samples)
    plan = audit_plan(blueprint, typical, exit_layers=(5,), max_new_tokens=NUM_ANSWER_TOKENS)
    rows = rows_of(vlm, samples[:3])
    answers = [torch.full((NUM_ANSWER_TOKENS,), 12)] * 3
    batch = collate([row.prompt for row in rows], answers, pad_token_id=vlm.pad_token_id)
    features = vlm.family_row.feature_inputs([row.features for row in rows if row.features is not None])
    with torch.no_grad():
        cache = vlm.model(**batch, **features, use_cache=True).past_key_values
    used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * plan.cache_per_row == used
    # joining batches copies the cache
    assert part(plan, "rows under generation") > 2 * plan.rows * plan.cache_per_row


def test_features(pair: tuple[Blueprint, VLM], samples: list[Sample]) -> None:
    blueprint, vlm = pair
    typical = typical_prompt(blueprint, samples)
    plan = align_plan(blueprint, typical, exit_layers=(2, 5), num_samples=6, config=settings())
    kept = FeatureStore(vlm, samples, [2, 5], max_bytes=1e9)._kept
    assert kept is not None
    features = sum(tensor.nbytes for by_exit in kept for row in by_exit.values() for tensor in row.features or ())
    inputs = sum(tensor.nbytes for by_exit in kept for tensor in by_exit[2].prompt.image_inputs.values())
    assert part(plan, "feature cache") == features + inputs


def test_with_an_adapter_each_one_exit_at_a_time_is_held(folders: dict[str, Path], samples: list[Sample]) -> None:
    blueprint = load_blueprint(folders["llava"])
    typical = typical_prompt(blueprint, samples)

    def plan(exit_layers: Sequence[int], **changes: Any) -> Plan:
        return align_plan(blueprint, typical, exit_layers=exit_layers, num_samples=6, config=settings(**changes))

    assert plan((2, 5), adapters="per-layer") == plan((5,))
    assert part(plan((2, 5)), "feature cache") > part(plan((5,)), "feature cache")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_and_logits(
    folders: dict[str, Path], samples: list[Sample], dtype: str, gradient_checkpointing: bool
) -> None:
    for family in FAMILIES if dtype == "float32" else FAMILIES[:1]:
        blueprint, vlm = (
            load_blueprint(folders[family], dtype=dtype),
            load_vlm(folders[family], dtype=dtype, device="cpu"),
        )
        config = settings(gradient_checkpointing=gradient_checkpointing)
        plan = align_plan(blueprint, typical_prompt(blueprint, samples), exit_layers=(5,), num_samples=6, config=config)
        with attached_policy(vlm, config) as policy:
            used = measured_bytes(policy, rows_of(vlm, samples[:4]))
            block = 0
            if gradient_checkpointing:  # the backward pass has one block whole at a time
                policy.gradient_checkpointing = False
                whole = measured_bytes(policy, rows_of(vlm, samples[:4]))
                block = (whole - used) // vlm.text_config.num_hidden_layers
        planned = part(plan, "activations") + part(plan, "logits")
        assert planned == pytest.approx(used + block, rel=0.08), family


def measured_bytes(policy: Policy, rows: list[Row]) -> int:
    """What a real pass keeps for backward, by torch's own hooks."""
    answers = [torch.full((NUM_ANSWER_TOKENS - (place == 0),), 12) for place in range(len(rows))]  # so there is a mask
    with keeping_count(policy.vlm.model) as kept:
        policy.evaluate(rows, answers)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_packed_groups_share_their_prompt(folders: dict[str, Path], samples: list[Sample]) -> None:
    blueprint = load_blueprint(folders["llava"])
    typical = typical_prompt(blueprint, samples)
    kept = [
        part(align_plan(blueprint, typical, exit_layers=(5,), num_samples=6, config=config), "activations")
        for config in (settings(batch_size=8, minibatch_size=4), settings(batch_size=8, minibatch_size=4, group_size=4))
    ]
    length = typical.num_prompt_tokens
    tokens = (4 * (length + NUM_ANSWER_TOKENS), length + 4 * NUM_ANSWER_TOKENS)
    assert kept[1] / kept[0] == pytest.approx(tokens[1] / tokens[0], rel=0.2)


def test_the_peak_is_of_the_largest_phase_and_is_held_against_what_is_free(
    folders: dict[str, Path], samples: list[Sample]
) -> None:
    blueprint = load_blueprint(folders["llava"])
    typical = typical_prompt(blueprint, samples)

    def plan(free: int | None) -> Plan:
        return align_plan(blueprint, typical, exit_layers=(5,), num_samples=6, config=settings(), free=free)

    known = plan(None)
    phases = {"encoding", "rollout", "update"}
    by_phase = [sum(each.bytes for each in known.device if each.phase == phase) for phase in phases]
    always = sum(each.bytes for each in known.device if each.phase == "always")
    assert known.peak == always + max(by_phase)
    assert known.fits is None and known.rows_that_fit is None
    assert replace(known, free=known.peak).fits is False
    assert replace(known, free=2 * known.peak).fits is True
    assert plan(always // 2).rows_that_fit == 0
    assert plan(10**12).rows_that_fit == 256


def test_features_that_do_not_fit_are_said_to_be_computed_again(
    folders: dict[str, Path], samples: list[Sample]
) -> None:
    blueprint = load_blueprint(folders["llava"])
    typical = typical_prompt(blueprint, samples)
    config = settings(feature_cache_gb=0.0)
    cache, _ = align_plan(blueprint, typical, exit_layers=(5,), num_samples=6, config=config).host
    assert cache.bytes == 0
    assert "computed again in every step" in cache.note
