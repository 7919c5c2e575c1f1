"""Exits against stock transformers: equal bit for bit, nothing computed past the exit, nothing left behind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError
from exitsafe.exits.features import Features, tensors_in
from exitsafe.records import Sample
from tests.tiny_models import (
    NUM_LAYERS,
    noise_image,
    tiny_llava,
    tiny_llava_next,
    tiny_mllama,
    tiny_processor,
)


def stock_inputs(vlm: VLM, num_images: int = 1) -> dict[str, Tensor]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": "what colour is the left"}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [noise_image(n, (28 + 20 * n, 50)) for n in range(num_images)]
    return dict(vlm.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False))


def same(first: Features, second: Features) -> bool:
    """Whether the embeddings are the same, in every bit."""
    one, other = ([*tensors_in(features["image"]["pooler_output"])] for features in (first, second))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def logits(vlm: VLM, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return vlm.model(**inputs, **more).logits  # type: ignore[no-any-return]


def sliced_mllama(model: Any, exit_layer: int, *, skip_global: bool) -> Any:
    """A separate Llama 3.2 Vision that has only the exit's blocks."""
    config = copy.deepcopy(model.config)
    vision = config.vision_config
    vision.intermediate_layers_indices = [min(i, exit_layer - 1) for i in vision.intermediate_layers_indices]
    vision.num_hidden_layers = exit_layer
    vision.num_global_layers = 0 if skip_global else vision.num_global_layers
    small = type(model)(config).eval()
    wanted = small.state_dict()
    small.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted})
    return small


def test_default_exit_equals_the_untouched_model(vlm: VLM) -> None:
    inputs = stock_inputs(vlm, num_images=2)
    untouched = logits(vlm, inputs)
    with vlm.exit_at(vlm.default_exit):
        assert torch.equal(logits(vlm, inputs), untouched)


def test_every_exit_equals_stock(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)
    seen = []
    for exit_layer in vlm.exit_layers:
        if vlm.family == "mllama":
            expected = sliced_mllama(vlm.model, exit_layer, skip_global=False)(**inputs).logits
        else:
            expected = logits(vlm, inputs, vision_feature_layer=exit_layer)
        with vlm.exit_at(exit_layer):
            assert torch.equal(logits(vlm, inputs), expected)
        seen.append(expected)
    for first, second in itertools.pairwise(seen):
        assert not torch.equal(first, second), "the tiny model must tell its exits apart"


def test_skip_global_equals_a_model_without_global_blocks() -> None:
    vlm = VLM(tiny_mllama(), tiny_processor("mllama"), name="tiny")
    inputs = stock_inputs(vlm)
    for exit_layer in (1, 4, NUM_LAYERS):
        expected = sliced_mllama(vlm.model, exit_layer, skip_global=True)(**inputs).logits
        with vlm.exit_at(exit_layer, skip_global=True):
            assert torch.equal(logits(vlm, inputs), expected)
        with vlm.exit_at(exit_layer):
            assert not torch.equal(logits(vlm, inputs), expected)


def test_skip_global_is_refused_where_there_are_no_global_blocks() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    with pytest.raises(InputError, match="no global blocks"), vlm.exit_at(2, skip_global=True):
        pass


def count_attention(vlm: VLM, run: Any) -> list[int]:
    """How often each encoder block's attention ran. Hooks on a skipped block itself would still fire."""
    counts = [0] * vlm.num_layers
    handles = []
    for index, block in enumerate(vlm.encoder_blocks):

        def count(*_: object, index: int = index) -> None:
            counts[index] += 1

        handles.append(block.get_submodule("self_attn").register_forward_hook(count))
    run()
    for handle in handles:
        handle.remove()
    return counts


def test_skipped_blocks_compute_nothing(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)

    def run() -> None:
        with vlm.exit_at(2):
            logits(vlm, inputs)

    assert count_attention(vlm, run) == [1, 1] + [0] * (vlm.num_layers - 2)


def test_default_exit_skips_the_needless_last_block() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    inputs = stock_inputs(vlm)

    def run() -> None:
        with vlm.exit_at(vlm.default_exit):
            logits(vlm, inputs)

    assert count_attention(vlm, lambda: logits(vlm, inputs)) == [1] * 6
    assert count_attention(vlm, run) == [1] * 5 + [0]


def snapshot(vlm: VLM) -> tuple[Any, ...]:
    modules = {name: sorted(module.__dict__) for name, module in vlm.model.named_modules()}
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    return modules, vlm.model.config.to_dict(), weights


def assert_restored(vlm: VLM, before: tuple[Any, ...]) -> None:
    after = snapshot(vlm)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())


def test_leaving_restores_the_model(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)
    untouched = logits(vlm, inputs)  # also installs the capture hooks
    before = snapshot(vlm)
    with pytest.raises(RuntimeError, match="boom"), vlm.exit_at(3), vlm.exit_at(1):
        raise RuntimeError("boom")
    assert_restored(vlm, before)
    assert torch.equal(logits(vlm, inputs), untouched)


def test_the_innermost_exit_acts_and_the_outer_one_returns(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)
    expected = {}
    for exit_layer in (2, 5):
        with vlm.exit_at(exit_layer):
            expected[exit_layer] = logits(vlm, inputs)
    with vlm.exit_at(2):
        with vlm.exit_at(5):
            assert torch.equal(logits(vlm, inputs), expected[5])
        assert torch.equal(logits(vlm, inputs), expected[2])


def test_nested_exits_of_a_list_of_layers() -> None:
    vlm = VLM(tiny_llava(vision_feature_layer=[1, 3, -2]), tiny_processor("llava"), name="tiny")
    inputs = stock_inputs(vlm)
    alone = vlm.image_features(inputs, (4, 5))
    with vlm.exit_at(5):
        expected = logits(vlm, inputs)
    with vlm.exit_at(2):
        inside = vlm.image_features(inputs, (4, 5))
        with vlm.exit_at(5):
            assert torch.equal(logits(vlm, inputs), expected)
    for exit_layer in (4, 5):
        assert same(inside[exit_layer], alone[exit_layer])


def test_an_instance_forward_of_somebody_else_survives() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    block = vlm.encoder_blocks[-1]
    wrapped = block.forward
    block.forward = wrapped
    with vlm.exit_at(1):
        assert block.forward is not wrapped
    assert block.__dict__["forward"] is wrapped


@pytest.mark.parametrize(("vision_feature_layer", "default"), [(-2, 5), (-1, 6), (4, 4), ([1, 3, -2], 5), ([0, 6], 6)])
def test_default_exit_from_the_config(vision_feature_layer: int | list[int], default: int) -> None:
    for make, family in ((tiny_llava, "llava"), (tiny_llava_next, "llava_next")):
        vlm = VLM(make(vision_feature_layer=vision_feature_layer), tiny_processor(family), name="tiny")
        assert vlm.default_exit == default


def test_a_list_of_layers_keeps_its_shallower_entries() -> None:
    vlm = VLM(tiny_llava(vision_feature_layer=[1, 3, -2]), tiny_processor("llava"), name="tiny")
    inputs = stock_inputs(vlm)
    for exit_layer in vlm.exit_layers:
        expected = logits(vlm, inputs, vision_feature_layer=[min(index, exit_layer) for index in (1, 3, 5)])
        with vlm.exit_at(exit_layer):
            assert torch.equal(logits(vlm, inputs), expected)
    found = vlm.image_features(inputs, vlm.exit_layers)
    for exit_layer in vlm.exit_layers:
        with vlm.exit_at(exit_layer), torch.no_grad():
            alone = vlm.model.get_image_features(inputs["pixel_values"])
        assert same(found[exit_layer], {"image": alone})


@pytest.mark.parametrize("exit_layer", [0, -1, 7, True, 2.0])
def test_exit_layer_out_of_range(exit_layer: Any) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    with (
        pytest.raises(ExitLayerError, match="this encoder has 6 blocks: choose 1 to 6"),
        vlm.exit_at(exit_layer),
    ):
        pass


def test_stock_generate_inside_an_exit(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)
    with vlm.exit_at(2):
        tokens = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    sample = Sample(id="a", prompt="what colour is the left", images=(noise_image(0, (28, 50)),), kind="benign")
    response = vlm.generate([sample], 2, max_new_tokens=6)[0]
    assert vlm.decode(tokens[0, inputs["input_ids"].shape[1] :].tolist()) == response.text
