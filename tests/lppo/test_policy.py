"""The policy: adapter on the language model only, scored as sampled, reference untouched, model given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.adapters import load_adapter
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.policy import Policy, PolicyOutput, attached_policy
from exitsafe.records import Sample
from tests.lppo.conftest import make_vlm, tiny_config

RESPONSES = [torch.tensor(ids) for ids in ([12, 13, 2], [14], [20, 11, 12, 13, 15], [9, 2])]


def rows_at(vlm: VLM, samples: Sequence[Sample], exits: Sequence[int]) -> list[Row]:
    prompts = [vlm.encode_prompt(sample) for sample in samples]
    features = vlm.prompt_features(prompts, sorted(set(exits)))
    return [
        Row(prompt=prompt, exit_layer=exit_layer, features=found[exit_layer])
        for prompt, exit_layer, found in zip(prompts, exits, features, strict=True)
    ]


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in policy.weights().values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_only_the_language_model_is_trained(family: str, train: str) -> None:
    vlm = make_vlm(family)
    with attached_policy(vlm, tiny_config(train=train)) as policy:
        names = list(policy.weights())
        assert names
        if train == "lora":
            assert all(".language_model." in name and ".lora_" in name for name in names)
            decoder_linears = 7 * vlm.text_config.num_hidden_layers
            assert len(names) == 2 * decoder_linears
        else:
            trained = sum(weight.numel() for weight in policy.weights().values())
            base: Any = vlm.base_model
            language_model, head = base.model.language_model, base.lm_head
            whole = (*language_model.original_module.parameters(), *head.original_module.parameters())
            assert trained == sum(parameter.numel() for parameter in whole)
            assert all("language_model" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_model_is_given_back_as_it_was_also_after_an_error(vlm: VLM, train: str) -> None:
    vlm.model.train()
    vlm.model.model.vision_tower.eval()
    vlm.model.lm_head.weight.requires_grad_(False)
    model = vlm.model
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = set(model.__dict__)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), attached_policy(vlm, tiny_config(train=train)) as policy:
        perturb(policy)
        raise KeyboardInterrupt
    assert vlm.model is model
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert set(model.__dict__) == attributes
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_is_the_model_that_training_started_from(vlm: VLM, samples: list[Sample], train: str) -> None:
    rows = rows_at(vlm, samples[1:5], [1, 3, 5, 2])
    with attached_policy(vlm, tiny_config(train=train)) as policy:
        start = policy.evaluate(rows, RESPONSES).logprobs
        with policy.as_reference():
            assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, start)
        perturb(policy)
        moved = policy.evaluate(rows, RESPONSES).logprobs
        assert (moved - start).abs().max() > 1e-3
        with policy.as_reference():
            assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, start)
        assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, moved)


def adapted(vlm: VLM, folder: Path, train: str) -> VLM:
    """The model with an adapter that differs from its base."""
    with attached_policy(vlm, tiny_config(train=train)) as policy:
        perturb(policy)
        policy.save(folder)
    return VLM(load_adapter(make_vlm("llava").model, folder), vlm.processor, name="llava")


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("reference", ["start", "base"])
def test_training_continues_an_adapter_and_gives_it_back(
    vlm: VLM, samples: list[Sample], train: str, reference: str, tmp_path: Path
) -> None:
    warm = adapted(vlm, tmp_path / "adapter", train)
    rows = rows_at(warm, samples[1:5], [1, 3, 5, 2])
    model, weights = warm.model, {name: weight.clone() for name, weight in warm.model.state_dict().items()}
    requires_grad = {name: each.requires_grad for name, each in model.named_parameters()}
    with attached_policy(warm, tiny_config(reference=reference)) as policy:
        assert all("lora_" in name or "modules_to_save" in name for name in policy.weights())
        start = policy.evaluate(rows, RESPONSES).logprobs
        with policy.as_reference():
            near = policy.evaluate(rows, RESPONSES).logprobs
        base = Policy(vlm, tiny_config()).evaluate(rows, RESPONSES).logprobs
        assert torch.equal(near, start if reference == "start" else base)
        assert (start - base).abs().max() > 1e-3
        perturb(policy)
        moved = policy.evaluate(rows, RESPONSES).logprobs
        assert (moved - start).abs().max() > 1e-3
        with policy.as_reference():
            assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, near)
        assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, moved)
        policy.save(tmp_path / "further")
    assert warm.model is model
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert {name: each.requires_grad for name, each in model.named_parameters()} == requires_grad
    further = VLM(load_adapter(make_vlm("llava").model, tmp_path / "further"), vlm.processor, name="llava")
    assert torch.equal(Policy(further, tiny_config()).evaluate(rows, RESPONSES).logprobs, moved)


def stock_logprobs(vlm: VLM, sample: Sample, exit_layer: int, response: Tensor, temperature: float) -> Tensor:
    """One row by stock transformers with pixels: logits at [context - 1 : -1], special tokens impossible."""
    prompt = vlm.encode_prompt(sample)
    ids = torch.cat([prompt.input_ids, response])[None]
    with torch.no_grad(), vlm.exit_at(exit_layer):
        logits = vlm.model(input_ids=ids, **prompt.media).logits.float()[0]
    logits = logits[len(prompt.input_ids) - 1 : -1] / temperature
    logits[:, list(vlm.special_token_ids)] = -torch.inf
    logprobs: Tensor = logits.log_softmax(-1)
    return logprobs[torch.arange(len(response)), response]


def test_logprobs_equal_stock_transformers_row_by_row_whatever_the_padding(vlm: VLM, samples: list[Sample]) -> None:
    chosen, exits = samples[3:7], [1, 6, 3, 5]
    expected = [
        stock_logprobs(vlm, sample, exit_layer, response, 0.7)
        for sample, exit_layer, response in zip(chosen, exits, RESPONSES, strict=True)
    ]
    with attached_policy(vlm, tiny_config(temperature=0.7)) as policy, torch.no_grad():
        rows = rows_at(vlm, chosen, exits)
        together = policy.evaluate(rows, RESPONSES)
        assert len({len(row.prompt.input_ids) for row in rows}) > 1  # so there was padding at the left
        for i, (row, response, wanted) in enumerate(zip(rows, RESPONSES, expected, strict=True)):
            alone = policy.evaluate([row], [response])
            assert together.mask[i].tolist() == [True] * len(response) + [False] * (5 - len(response))
            assert torch.allclose(together.logprobs[i, together.mask[i]], wanted, atol=1e-5)
            assert torch.allclose(alone.logprobs[0], wanted, atol=1e-5)
            for field in ("logprobs", "values", "entropy"):
                assert (getattr(together, field)[i, ~together.mask[i]] == 0).all()
            assert torch.allclose(alone.entropy[0], together.entropy[i, together.mask[i]], atol=1e-5)


def test_what_is_sampled_is_what_is_scored(vlm: VLM, samples: list[Sample]) -> None:
    """First tokens of 2,000 rollouts follow the scored distribution; special tokens never come."""
    temperature, vocabulary = 0.6, vlm.text_config.vocab_size
    row = rows_at(vlm, samples[1:2], [3])[0]
    special = list(vlm.special_token_ids)
    allowed = [token for token in range(vocabulary) if token not in special]
    assert vlm.eos_token_ids[0] in allowed
    probabilities = torch.zeros(vocabulary)
    with attached_policy(vlm, tiny_config(temperature=temperature)) as policy, torch.no_grad():
        evaluated = policy.evaluate([row] * len(allowed), [torch.tensor([token]) for token in allowed])
        probabilities[allowed] = evaluated.logprobs[:, 0].exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)  # nothing is left for special tokens
    entropy = -(probabilities[allowed] * evaluated.logprobs[:, 0]).sum()
    assert evaluated.entropy[0, 0].item() == pytest.approx(entropy.item(), abs=1e-4)
    drawn = torch.zeros(vocabulary)
    # the random numbers are keyed by the sample's id
    rows = [replace(row, prompt=replace(row.prompt, sample_id=str(draw))) for draw in range(2000)]
    for _, completion in vlm.complete(
        rows, max_new_tokens=1, temperature=temperature, seed=0, batch_size=250, suppress=special
    ):
        drawn[completion.token_ids[0]] += 1
    assert (drawn[special] == 0).all()
    common = probabilities > 0.005
    chi2 = ((drawn - 2000 * probabilities) ** 2 / (2000 * probabilities))[common].sum().item()
    degrees = int(common.sum())
    assert degrees >= 5
    assert chi2 < degrees + 4.5 * (2 * degrees) ** 0.5


def test_the_value_head_starts_at_zero_and_its_gradient_stops_at_the_head(vlm: VLM, samples: list[Sample]) -> None:
    rows = rows_at(vlm, samples[1:5], [1, 3, 5, 2])
    with attached_policy(vlm, tiny_config()) as policy:
        assert (policy.evaluate(rows, RESPONSES).values == 0).all()
        perturb(policy)  # LoRA's second matrix starts at zero and would hide a gradient
        torch.nn.init.ones_(policy.value_head.weight)
        evaluated = policy.evaluate(rows, RESPONSES)
        assert evaluated.values[evaluated.mask].std() > 0
        evaluated.values.sum().backward()
        assert policy.value_head.weight.grad is not None
        assert all(weight.grad is None for weight in policy.weights().values())


def test_no_dropout_even_if_the_model_came_in_training_mode(samples: list[Sample]) -> None:
    vlm = make_vlm("llava")
    vlm.model.train()
    for module in vlm.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with attached_policy(vlm, tiny_config()) as policy:
        rows = rows_at(vlm, samples[1:5], [1, 3, 5, 2])
        assert torch.equal(policy.evaluate(rows, RESPONSES).logprobs, policy.evaluate(rows, RESPONSES).logprobs)
    assert vlm.model.training


def test_log_probabilities_and_values_are_float32_in_a_bfloat16_model(vlm: VLM, samples: list[Sample]) -> None:
    vlm.model.to(torch.bfloat16)
    with attached_policy(vlm, tiny_config()) as policy:
        evaluated: PolicyOutput = policy.evaluate(rows_at(vlm, samples[1:5], [1, 3, 5, 2]), RESPONSES)
        assert {evaluated.logprobs.dtype, evaluated.values.dtype, evaluated.entropy.dtype} == {torch.float32}
        assert {weight.dtype for weight in policy.weights().values()} == {torch.float32}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_saved_adapter_loads_and_merges_to_the_same_logits(
    samples: list[Sample], train: str, tmp_path: Path
) -> None:
    vlm = make_vlm("llava")
    prompt = vlm.encode_prompt(samples[1])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.media}
    start = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    with attached_policy(vlm, tiny_config(train=train)) as policy:
        perturb(policy)
        with torch.no_grad():
            wanted = vlm.model(**inputs).logits
        policy.save(tmp_path / "adapter")
    fresh = make_vlm("llava").model
    fresh.load_state_dict(start)
    adapted = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, wanted)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(**inputs).logits, wanted, atol=1e-4)
    assert merged.state_dict().keys() == start.keys()
    encoder = [name for name in start if "vision_tower" in name or "projector" in name]
    assert encoder
    assert all(torch.equal(merged.state_dict()[name], start[name]) for name in encoder)


def test_the_config_seed_alone_decides_the_first_weights(vlm: VLM) -> None:
    first_weights = []
    for callers_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(callers_seed)
        with attached_policy(vlm, tiny_config(seed=seed)) as policy:
            first_weights.append([weight.detach().clone() for weight in policy.weights().values()])
    same, again, other = first_weights
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_what_cannot_be_trained_is_refused(vlm: VLM, tmp_path: Path) -> None:
    adapted = VLM(
        get_peft_model(make_vlm("llava").model, LoraConfig(target_modules=["fc1"])), vlm.processor, name="mine"
    )
    with (
        pytest.raises(
            InputError, match=r"the adapter of mine changes .*vision.*fc1, but align trains the language model only"
        ),
        attached_policy(adapted, LPPOConfig()),
    ):
        pass
    with attached_policy(vlm, LPPOConfig(lora_rank=4)) as policy:
        policy.save(tmp_path / "adapter")
    adapted = VLM(
        PeftModel.from_pretrained(make_vlm("llava").model, str(tmp_path / "adapter")), vlm.processor, name="mine"
    )
    for config, message in (
        (LPPOConfig(lora_rank=8), "lora_rank=8, but the adapter to continue has rank 4: leave lora_rank out"),
        (LPPOConfig(lora_alpha=7), "lora_alpha=7, but the adapter to continue has alpha 32: leave lora_alpha out"),
        (LPPOConfig(train="full"), "train='full', but the adapter to continue is of kind 'lora': leave train out"),
    ):
        with pytest.raises(InputError, match=message), attached_policy(adapted, config):
            pass
    vlm.model.to(torch.bfloat16)
    with (
        pytest.raises(InputError, match=r"train='full' needs float32 weights, not torch\.bfloat16"),
        attached_policy(vlm, LPPOConfig(train="full")),
    ):
        pass
