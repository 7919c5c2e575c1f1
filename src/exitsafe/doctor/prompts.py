"""Lengths of prompts and sizes of their image features, from samples or for an assumed prompt with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exitsafe.doctor.blueprint import META, Blueprint
from exitsafe.engine.processor import noise_picture
from exitsafe.records import Sample

TEXT_TOKENS = 64
"""Text tokens assumed without samples: a red-team prompt and the chat template."""
_PROBES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Typical:
    """The largest prompt of a run, approximately."""

    num_prompt_tokens: int
    """Includes image tokens, if the family has them in the prompt."""
    feature_bytes: int
    """Size of its image features at one exit, after the projector."""
    image_states: Tensor | None
    """(1, tokens, H) on the meta device, if the language model reads pictures by cross-attention."""
    image_inputs: Mapping[str, Tensor]
    """The encoder's inputs."""
    is_measured: bool
    """Whether it is from samples; otherwise a picture and `TEXT_TOKENS` are assumed."""


def typical_prompt(blueprint: Blueprint, samples: Sequence[Sample] = ()) -> Typical:
    """The largest prompt among the samples with the most pictures and longest texts; without samples or a processor,
    one picture that fills all tiles and `TEXT_TOKENS` of text.

    Raises:
        InputError: If a sample cannot be read.
    """
    if not samples or blueprint.processor is None:
        picture = noise_picture(blueprint, torch.Generator())
        return _measure(blueprint, picture, num_text_tokens=TEXT_TOKENS, is_measured=False)
    likely = sorted(samples, key=lambda sample: (-len(sample.images), -len(sample.prompt)))[:_PROBES]
    prompts = [blueprint.encode_prompt(sample) for sample in likely]
    largest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    return _measure(blueprint, largest.image_inputs, num_text_tokens=len(largest.input_ids), is_measured=True)


def _measure(
    blueprint: Blueprint, image_inputs: Mapping[str, Tensor], *, num_text_tokens: int, is_measured: bool
) -> Typical:
    """If measured, `num_text_tokens` already includes image tokens."""
    inputs = {name: _on_meta(name, tensor, blueprint.base_model.dtype) for name, tensor in image_inputs.items()}
    with torch.no_grad():
        features = blueprint.family_row.features(blueprint.base_model, inputs) if inputs else ()
    reads_across = bool(blueprint.family_row.image_cache_layers(blueprint.text_config)) and bool(features)
    num_image_tokens = 0 if reads_across or is_measured else sum(image.shape[0] for image in features)
    return Typical(
        num_prompt_tokens=num_text_tokens + num_image_tokens,
        feature_bytes=sum(tensor.nbytes for tensor in features),
        image_states=features[0].flatten(0, 1)[None] if reads_across else None,
        image_inputs=inputs,
        is_measured=is_measured,
    )


def _on_meta(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name == "image_sizes":  # the model reads its values to choose shapes
        return tensor
    return tensor.to(META, dtype if tensor.is_floating_point() else tensor.dtype)
