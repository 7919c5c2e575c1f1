"""All exits from one pass equal the exits one by one."""

from __future__ import annotations

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.encoder import media_inputs, run_encoder
from exitsafe.records import Sample
from tests.exits.test_cut import count_attention, same, stock_inputs


def test_one_pass_equals_one_exit_at_a_time(vlm: VLM) -> None:
    inputs = stock_inputs(vlm, num_images=2)
    found = vlm.image_features(inputs, vlm.exit_layers)
    assert tuple(found) == vlm.exit_layers
    for exit_layer in vlm.exit_layers:
        assert same(found[exit_layer], vlm.image_features(inputs, [exit_layer])[exit_layer])
    assert not same(found[1], found[2])


def test_the_encoder_runs_once_up_to_the_deepest(vlm: VLM) -> None:
    inputs = stock_inputs(vlm)
    counts = count_attention(vlm, lambda: vlm.image_features(inputs, (1, 4, 2)))
    assert counts == [1] * 4 + [0] * (vlm.num_layers - 4)


def test_skip_global_reaches_the_features() -> None:
    from tests.tiny_models import tiny_mllama, tiny_processor

    vlm = VLM(tiny_mllama(), tiny_processor("mllama"), name="tiny")
    inputs = stock_inputs(vlm)
    skipped = vlm.image_features(inputs, (2, 6), skip_global=True)
    for exit_layer in (2, 6):
        with vlm.exit_at(exit_layer, skip_global=True):
            alone = run_encoder(vlm.model, "image", media_inputs(vlm.model, inputs, "image"))
        assert same(skipped[exit_layer], {"image": alone})
    assert not same(skipped[2], vlm.image_features(inputs, (2, 6))[2])


def test_by_prompt_equals_alone(vlm: VLM, samples: list[Sample]) -> None:
    prompts = [vlm.encode_prompt(sample) for sample in samples]
    together = vlm.prompt_features(prompts, (2, 5))
    for prompt, found in zip(prompts, together, strict=True):
        alone = vlm.prompt_features([prompt], (2, 5))[0]
        for exit_layer in (2, 5):
            left, right = found[exit_layer], alone[exit_layer]
            if left is None or right is None:
                assert left is right is None and not prompt.media
                continue
            assert same(left, right)


def test_inputs_without_an_image_are_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="inputs have no pixel_values"):
        vlm.image_features({"input_ids": torch.zeros(1, 3)}, (1,))


def test_no_exit_layers_no_work(vlm: VLM) -> None:
    assert vlm.image_features(stock_inputs(vlm), ()) == {}
