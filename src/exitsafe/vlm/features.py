"""Image features at any set of exit layers from one encoder pass.

The encoder runs once, up to the deepest exit wanted, and keeps each block's output. Shallower exits are *replayed*:
every block returns a kept output instead of computing, and the model's own feature path (class-token drop, tiles,
norms, global blocks, projector) runs on it. The encoder and projector are frozen here: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from exitsafe.errors import InputError
from exitsafe.vlm.exits import replay_patch
from exitsafe.vlm.finite import not_finite
from exitsafe.vlm.layers import check_exit_layer
from exitsafe.vlm.memory import BatchSize, as_batch_size
from exitsafe.vlm.prompts import Prompt

if TYPE_CHECKING:
    from exitsafe.vlm.model import VLM

T = TypeVar("T")
_NO_MEMORY = (
    "out of memory while encoding the images of a single prompt: audit fewer exit layers at a time, or use a smaller "
    "dtype"
)

Features = tuple[Tensor, ...]
"""What the language model reads of one prompt's images; opaque outside the family."""


@torch.no_grad()
def compute_features(
    vlm: VLM, inputs: Mapping[str, Tensor], exit_layers: Sequence[int], *, skip_global: bool
) -> dict[int, Features]:
    """Features of `inputs` at every exit in `exit_layers`, by exit layer."""
    model, family = vlm.base_model, vlm.family_row
    return _at_exits(vlm, inputs, exit_layers, lambda images: family.features(model, images), skip_global=skip_global)


@torch.no_grad()
def projector_inputs(vlm: VLM, inputs: Mapping[str, Tensor], exit_layers: Sequence[int]) -> dict[int, Tensor]:
    """What the projector receives at every exit in `exit_layers`, translated if the model has translators:
    (tokens of all images and tiles, width)."""
    model, family = vlm.base_model, vlm.family_row
    assert family.projector is not None
    projector = model.get_submodule(family.projector)
    received: list[Tensor] = []

    def read(images: Mapping[str, Tensor]) -> Tensor:
        # at the exit's entry into the patch, so behind a translator's hook
        recorder = projector.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        try:
            family.features(model, images)
        finally:
            recorder.remove()
        return received.pop().flatten(0, -2)

    return _at_exits(vlm, inputs, exit_layers, read, skip_global=False)


def _at_exits(
    vlm: VLM,
    inputs: Mapping[str, Tensor],
    exit_layers: Sequence[int],
    read: Callable[[Mapping[str, Tensor]], T],
    *,
    skip_global: bool,
) -> dict[int, T]:
    """What `read` makes of the images inside every exit, from one encoder pass."""
    for exit_layer in exit_layers:
        check_exit_layer(exit_layer, vlm.num_layers)
    if not exit_layers:
        return {}
    model, family = vlm.base_model, vlm.family_row
    missing = [name for name in family.image_inputs if name not in inputs]
    if missing:
        raise InputError(f"inputs have no {' and no '.join(missing)}: give what the processor makes of images")
    # sizes stay on the CPU: the model reads their numbers to choose shapes
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


def features_by_prompt(
    vlm: VLM,
    prompts: Sequence[Prompt],
    exit_layers: Sequence[int],
    *,
    batch_size: int | BatchSize,
    skip_global: bool,
) -> list[dict[int, Features | None]]:
    """`compute_features` for many prompts, in batches, split by prompt; None for a prompt without images.

    Batches are halved when memory runs out.

    Raises:
        ModelError: If a feature is NaN or infinite.
        RunError: If memory runs out with the images of a single prompt.
    """
    family = vlm.family_row
    found: list[dict[int, Features | None]] = [dict.fromkeys(exit_layers) for _ in prompts]
    by_key: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if prompt.image_inputs:
            by_key.setdefault(family.batch_key(prompt.image_inputs), []).append(index)

    def encode(batch: Sequence[int]) -> None:
        inputs = family.collate_images([prompts[index].image_inputs for index in batch])
        counts = [family.images_per_prompt(prompts[index].image_inputs) for index in batch]
        for exit_layer, features in compute_features(vlm, inputs, exit_layers, skip_global=skip_global).items():
            offset = 0
            for index, count in zip(batch, counts, strict=True):
                found[index][exit_layer] = features[offset : offset + count]
                offset += count
        _check_finite(vlm, {prompts[index].sample_id: found[index] for index in batch})

    batch_size = as_batch_size(batch_size, problem=_NO_MEMORY)
    for indices in by_key.values():
        for _ in batch_size.batches(encode, indices):
            pass
    return found


def _check_finite(vlm: VLM, features: Mapping[str, Mapping[int, Features | None]]) -> None:
    """One wait for the device, however many samples and exits."""
    places = [
        (exit_layer, sample_id, image)
        for sample_id, by_exit in features.items()
        for exit_layer, images in by_exit.items()
        for image in images or ()
    ]
    is_finite = torch.stack([image.isfinite().all() for _, _, image in places]).tolist()
    if not all(is_finite):
        exit_layer, sample_id, _ = places[is_finite.index(False)]
        raise not_finite("image features", exit_layer=exit_layer, sample_id=sample_id, dtype=vlm.base_model.dtype)


def _recorder(stored: list[Tensor]) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
    def keep(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        stored.append(output)

    return keep
