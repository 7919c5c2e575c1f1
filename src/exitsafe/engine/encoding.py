"""The features of many prompts at several exits: one encoder pass per prompt, so that none depends on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exitsafe.engine.prompts import Prompt
from exitsafe.exits.features import Features, compute_features, tensors_in
from exitsafe.exits.finite import not_finite
from exitsafe.exits.model import ExitingModel


def features_by_prompt(
    vlm: ExitingModel, prompts: Sequence[Prompt], exit_layers: Sequence[int], *, skip_global: bool
) -> list[dict[int, Features | None]]:
    """`compute_features` for many prompts.

    Returns:
        For each prompt its features by exit layer; None for a prompt without media.

    Raises:
        ModelError: If a feature is NaN or infinite.
    """
    found: list[dict[int, Features | None]] = []
    for prompt in prompts:
        by_exit: dict[int, Features | None] = dict.fromkeys(exit_layers)
        if prompt.media:
            by_exit |= compute_features(vlm, prompt.media, exit_layers, skip_global=skip_global)
        found.append(by_exit)
    _check_finite(vlm, {prompt.sample_id: each for prompt, each in zip(prompts, found, strict=True)})
    return found


def _check_finite(vlm: ExitingModel, features: Mapping[str, Mapping[int, Features | None]]) -> None:
    """Raise ModelError for NaN and infinity; waits for the device only once."""
    places = [
        (exit_layer, sample_id, tensor)
        for sample_id, by_exit in features.items()
        for exit_layer, found in by_exit.items()
        for tensor in tensors_in(found or ())
        if tensor.is_floating_point()
    ]
    if not places:
        return
    is_finite = torch.stack([tensor.isfinite().all() for _, _, tensor in places]).tolist()
    if not all(is_finite):
        exit_layer, sample_id, _ = places[is_finite.index(False)]
        raise not_finite("image features", exit_layer=exit_layer, sample_id=sample_id, dtype=vlm.base_model.dtype)
