"""Finding a model's encoder by running it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPEncoderLayer

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError
from exitsafe.exits.encoder import block_list
from tests.exits.test_cut import assert_restored, logits, snapshot, stock_inputs
from tests.tiny_models import NUM_LAYERS, tiny_llava, tiny_processor

CLIP = ("model.vision_tower.encoder.layers", 5, "model.multi_modal_projector", "clip_vision_model")
FOUND = {
    "llava": CLIP,
    "llava_next": CLIP,
    "llava-siglip": (CLIP[0], 6, CLIP[2], "siglip_vision_model"),
    "mllama": ("model.vision_model.transformer.layers", 6, None, "mllama_vision_model"),
}


def test_what_is_found(vlm: VLM) -> None:
    encoder = vlm.encoder
    assert (encoder.path, encoder.default_exit, encoder.projector, encoder.kind) == FOUND[vlm.name]
    assert (encoder.modality, encoder.num_layers, encoder.is_sliced) == ("image", NUM_LAYERS, False)
    assert list(vlm.encoder_blocks) == block_list(vlm.base_model, encoder.path)


class Pairs(CLIPEncoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), None


class OfPairs(CLIPEncoder):
    def forward(self, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        for block in self.layers:
            inputs_embeds, _ = block(inputs_embeds, None)
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def test_blocks_may_return_tuples() -> None:
    model = tiny_llava()
    plain = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    model.model.vision_tower.encoder.__class__ = OfPairs
    for block in model.model.vision_tower.encoder.layers:
        block.__class__ = Pairs
    vlm = VLM(model, tiny_processor("llava"), name="tiny")
    assert (vlm.encoder.num_returned, vlm.encoder.path) == (2, plain.encoder.path)
    inputs = stock_inputs(vlm)
    for exit_layer in vlm.exit_layers:
        with vlm.exit_at(exit_layer), plain.exit_at(exit_layer):
            assert torch.equal(logits(vlm, inputs), logits(plain, inputs))


def twice(model: Any) -> None:
    layers = model.model.vision_tower.encoder.layers
    model.model.vision_tower.encoder.layers = nn.ModuleList([*layers[:3], *layers[:3]])


def two_towers(model: Any) -> None:
    model.model.second_tower = copy.deepcopy(model.model.vision_tower)


def dictionaries(model: Any) -> None:
    class Named(CLIPEncoderLayer):
        def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return {"hidden": super().forward(given["hidden"] if isinstance(given, dict) else given, *args, **kwargs)}

    def features(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden = model.model.vision_tower.embeddings(pixel_values)
        for block in model.model.vision_tower.encoder.layers:
            block.__class__ = Named
            hidden = block(hidden, None)
        return BaseModelOutputWithPooling(pooler_output=model.model.multi_modal_projector(hidden["hidden"]))

    model.model.get_image_features = features


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (twice, "tiny has no image encoder: none of its lists of blocks runs in order, block by block"),
        (dictionaries, "returns dict, and only blocks that return tensors can be skipped"),
        (two_towers, r"has two encoders, model\.vision_tower\.encoder\.layers and model\.second_tower\.encoder"),
    ],
)
def test_what_has_no_one_encoder_is_refused(damage: Any, message: str) -> None:
    model = tiny_llava()
    damage(model)
    with pytest.raises(ModelError, match=message):
        VLM(model, tiny_processor("llava"), name="tiny")


def test_finding_leaves_the_model_as_it_was(vlm: VLM) -> None:
    logits(vlm, stock_inputs(vlm))  # also installs the capture hooks
    before = snapshot(vlm)
    hooks = [len(module._forward_hooks) for module in vlm.model.modules()]
    VLM(vlm.model, vlm.processor, name="again")
    assert_restored(vlm, before)
    assert [len(module._forward_hooks) for module in vlm.model.modules()] == hooks


def test_a_given_encoder_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    proven = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    monkeypatch.setattr("exitsafe.engine.reader.prove_exits", None)
    given = VLM(proven.model, None, name="tiny", encoder=proven.encoder)
    with torch.no_grad(), given.exit_at(2):
        assert proven.model(**stock_inputs(proven)).logits.isfinite().all()
