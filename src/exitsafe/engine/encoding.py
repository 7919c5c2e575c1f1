"""The image features of many prompts at several exits, from as few encoder passes as memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exitsafe.engine.prompts import Prompt
from exitsafe.exits.features import Features, compute_features
from exitsafe.exits.finite import not_finite
from exitsafe.exits.model import ExitingModel
from exitsafe.machine.memory import BatchSize, as_batch_size

_NO_MEMORY = (
    "out of memory while encoding the images of a single prompt: audit fewer exit layers at a time, or use a smaller "
    "dtype"
)


def features_by_prompt(
    vlm: ExitingModel,
    prompts: Sequence[Prompt],
    exit_layers: Sequence[int],
    *,
    batch_size: int | BatchSize,
    skip_global: bool,
) -> list[dict[int, Features | None]]:
    """`compute_features` for many prompts, in batches that are halved when memory runs out.

    Returns:
        For each prompt its features by exit layer; None for a prompt without images.

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


def _check_finite(vlm: ExitingModel, features: Mapping[str, Mapping[int, Features | None]]) -> None:
    """Raise ModelError for NaN and infinity; waits for the device only once."""
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
