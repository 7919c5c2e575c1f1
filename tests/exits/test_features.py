"""All exits from one pass equal the exits one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from exitsafe.engine.prompts import TEXT_INPUTS, Prompt, Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.encoder import media_inputs, run_encoder
from exitsafe.exits.features import projector_inputs, tensors_in
from exitsafe.records import Sample
from tests.any_model import StandIn
from tests.architectures import tiny, tiny_inputs
from tests.exits.test_cut import count_attention, same, stock_inputs
from tests.tiny_models import tiny_llava, tiny_mllama, tiny_processor


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


def test_pictures_that_pass_one_after_the_other_are_not_replayed() -> None:
    model = tiny_llava()
    together: Callable[..., Any] = model.model.get_image_features

    def one_by_one(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        parts = [together(picture[None], **kwargs).pooler_output for picture in pixel_values]
        return BaseModelOutputWithPooling(pooler_output=torch.cat([each for part in parts for each in part]))

    plain = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    inputs = stock_inputs(plain, num_images=2)
    model.model.get_image_features = one_by_one
    vlm = VLM(model, tiny_processor("llava"), name="tiny")
    found = vlm.image_features(inputs, (1, 3, 5))
    assert all(same(found[exit_layer], vlm.image_features(inputs, [exit_layer])[exit_layer]) for exit_layer in (1, 3))
    read, wanted = (projector_inputs(each, inputs, (1, 5)) for each in (vlm, plain))
    for exit_layer in (1, 5):
        torch.testing.assert_close(read[exit_layer], wanted[exit_layer])


def test_an_exit_does_not_change_what_another_encoder_reads() -> None:
    made = tiny("qwen2_5_omni_thinker")
    vlm = StandIn(made, name="tiny")
    sound = tiny_inputs(made.model, modality="audio")
    found = vlm.image_features(sound, (1, 3, 6))
    first, *others = ([*tensors_in(found[exit_layer]["audio"])] for exit_layer in (1, 3, 6))
    assert first and all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


@torch.no_grad()
def test_deepstack_features_of_a_picture_do_not_depend_on_a_video_at_a_shallower_exit() -> None:
    made = tiny("qwen3_vl")
    vlm = StandIn(made, name="tiny")
    rows = []
    for modality, exit_layer in (("image", 6), ("video", 1)):
        given = tiny_inputs(made.model, modality=modality)
        prompt = Prompt(
            sample_id=modality,
            input_ids=given["input_ids"][0],
            text_inputs={name: given[name][0] for name in TEXT_INPUTS if name in given},
            media={name: value for name, value in given.items() if name.startswith(("pixel", "image", "video"))},
        )
        features = vlm.image_features(prompt.media, [exit_layer])[exit_layer]
        rows.append(Row(prompt=prompt, exit_layer=exit_layer, features=features))
    together, alone = (vlm.model(**vlm.inputs(each)).logits[0, -1] for each in (rows, rows[:1]))
    torch.testing.assert_close(together, alone)


def test_inputs_without_an_image_are_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="inputs have no pictures, videos or audio"):
        vlm.image_features({"input_ids": torch.zeros(1, 3)}, (1,))


def test_no_exit_layers_no_work(vlm: VLM) -> None:
    assert vlm.image_features(stock_inputs(vlm), ()) == {}
