"""Each check of an encoder's exits refuses the model that breaks it, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError
from exitsafe.exits.checks import prove_exits
from tests.tiny_models import tiny_llava, tiny_processor


def blocks_of(model: Any) -> Any:
    return model.model.vision_tower.encoder.layers


def before_projector(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: (change(args[0]),))


def never_the_same(model: Any) -> None:
    calls: list[None] = []

    def add(hidden: Tensor) -> Tensor:
        calls.append(None)
        return hidden + len(calls)

    before_projector(model, add)


def an_idle_block(model: Any) -> None:
    block = blocks_of(model)[2]
    for linear in (block.self_attn.out_proj, block.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def a_part_of_a_later_block(model: Any) -> None:
    blocks = blocks_of(model)
    blocks[0].register_forward_hook(lambda module, args, output: output + 0 * blocks[5].mlp(output))


def a_state_beside_the_blocks(model: Any) -> None:
    seen: list[Tensor] = [torch.zeros(())]
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    before_projector(model, lambda hidden: hidden + seen[-1])


def a_memory_of_skips(model: Any) -> None:
    skips: list[None] = []

    def add(hidden: Tensor) -> Tensor:
        found = hidden + len(skips)
        forward = vars(blocks_of(model)[5]).get("forward")
        skips.extend([None] * (forward is not None and forward.__name__ == "forward"))  # a replay's is a lambda
        return found

    before_projector(model, add)


def a_stage_before(model: Any) -> None:
    tower = model.model.vision_tower
    tower.stage = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"inputs_embeds": tower.stage(kwargs["inputs_embeds"])}),
        with_kwargs=True,
    )


def another_config(model: Any) -> None:
    model.config.is_encoder_decoder = True


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (never_the_same, "tiny fails the check of default exit: with all 6 blocks the features are not the model's"),
        (an_idle_block, "tiny fails the check of distinct exits: exits 2 and 3 give the same features"),
        (a_part_of_a_later_block, "tiny fails the check of skipped blocks: at exit 3 a later block still computes"),
        (a_state_beside_the_blocks, "tiny fails the check of replay: the features of exit 3 differ"),
        (a_memory_of_skips, "tiny fails the check of restoring: after an exit the model is not as it was"),
        (
            a_stage_before,
            r"tiny fails the check of one encoder: model\.vision_tower\.stage runs too, whatever the exit",
        ),
        (another_config, "tiny is an encoder-decoder model"),
    ],
)
def test_a_broken_model_is_refused_by_the_name_of_the_check(damage: Callable[[Any], None], message: str) -> None:
    model = tiny_llava()
    damage(model)
    with pytest.raises(ModelError, match=message) as refusal:
        VLM(model, tiny_processor("llava"), name="tiny")
    assert "\n" not in str(refusal.value)


def test_a_modality_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ModelError, match="tiny has no audio encoder: its processor makes nothing that Llava"):
        prove_exits(tiny_llava(), {"pixel_values": torch.zeros(1, 3, 28, 28)}, modality="audio", name="tiny")


def test_pictures_of_another_size_are_the_processors_fault() -> None:
    with pytest.raises(ModelError, match="the processor of tiny does not fit the model: it makes pictures of 42x28"):
        prove_exits(tiny_llava(), {"pixel_values": torch.zeros(1, 3, 28, 42)}, modality="image", name="tiny")
