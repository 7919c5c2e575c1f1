"""Image features at any set of exit layers from one encoder pass.

The encoder runs once, up to the deepest exit wanted, and keeps each block's output. Shallower exits are *replayed*:
every block returns a kept output instead of computing, and the model's own feature path (class-token drop, tiles,
norms, global blocks, projector) runs on it. The encoder and projector are frozen here: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from exitsafe.errors import InputError
from exitsafe.exits.cut import replay_patch
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exits.model import ExitingModel

T = TypeVar("T")
Features = tuple[Tensor, ...]
"""What the language model reads from one prompt's images; opaque outside the family."""


@torch.no_grad()
def compute_features(
    vlm: ExitingModel, inputs: Mapping[str, Tensor], exit_layers: Sequence[int], *, skip_global: bool
) -> dict[int, Features]:
    """Features of `inputs` at every exit in `exit_layers`, by exit layer."""
    model, family = vlm.base_model, vlm.family_row
    return _at_exits(vlm, inputs, exit_layers, lambda images: family.features(model, images), skip_global=skip_global)


@torch.no_grad()
def projector_inputs(vlm: ExitingModel, inputs: Mapping[str, Tensor], exit_layers: Sequence[int]) -> dict[int, Tensor]:
    """The projector's inputs at every exit in `exit_layers`, translated if the model has translators:
    (tokens of all images and tiles, width)."""
    model, family = vlm.base_model, vlm.family_row
    assert family.projector is not None
    projector = model.get_submodule(family.projector)
    received: list[Tensor] = []

    def read(images: Mapping[str, Tensor]) -> Tensor:
        # registered inside the exit, so that it runs after a translator's hook
        recorder = projector.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        try:
            family.features(model, images)
        finally:
            recorder.remove()
        return received.pop().flatten(0, -2)

    return _at_exits(vlm, inputs, exit_layers, read, skip_global=False)


def _at_exits(
    vlm: ExitingModel,
    inputs: Mapping[str, Tensor],
    exit_layers: Sequence[int],
    read: Callable[[Mapping[str, Tensor]], T],
    *,
    skip_global: bool,
) -> dict[int, T]:
    """The result of `read` inside every exit, from one encoder pass."""
    for exit_layer in exit_layers:
        check_exit_layer(exit_layer, vlm.num_layers)
    if not exit_layers:
        return {}
    model, family = vlm.base_model, vlm.family_row
    missing = [name for name in family.image_inputs if name not in inputs]
    if missing:
        raise InputError(f"inputs have no {' and no '.join(missing)}: pass the processor's output for images")
    # sizes stay on the CPU: the model reads their values to choose shapes
    images = {
        name: inputs[name] if name == "image_sizes" else inputs[name].to(vlm.device) for name in family.image_inputs
    }
    images["pixel_values"] = images["pixel_values"].to(model.dtype)
    blocks = family.encoder_blocks(model)
    deepest, *shallower = sorted(set(exit_layers), reverse=True)
    stored: list[Tensor] = []
    recorders = [block.register_forward_hook(_recorder(stored)) for block in (blocks[:deepest] if shallower else ())]
    try:
        with vlm.exit_at(deepest, skip_global=skip_global):
            features = {deepest: read(images)}
    finally:
        for recorder in recorders:
            recorder.remove()
    for exit_layer in shallower:
        patch = replay_patch(
            blocks,
            family.global_blocks(model),
            vlm.exit_settings(exit_layer),
            stored + [stored[-1]] * (len(blocks) - deepest),
            exit_layer=exit_layer,
            skip_global=skip_global,
            hooks=vlm.translation_hooks(exit_layer),
        )
        with vlm.exits.enter(patch):
            features[exit_layer] = read(images)
    return {exit_layer: features[exit_layer] for exit_layer in exit_layers}


def _recorder(stored: list[Tensor]) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
    def keep(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        stored.append(output)

    return keep
