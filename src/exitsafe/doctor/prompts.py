"""Lengths of prompts and sizes of their image features, from samples or for an assumed prompt with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from exitsafe.doctor.blueprint import Blueprint
from exitsafe.exits.encoder import reads_across
from exitsafe.exits.features import compute_features, on_device, tensors_in
from exitsafe.records import Sample

TEXT_TOKENS = 64
"""Words of text assumed without samples: about a red-team prompt and the chat template."""
_PROBES = 4
_SIZE = (448, 448)


@dataclass(frozen=True, kw_only=True, eq=False)
class Typical:
    """The largest prompt of a run, approximately."""

    num_prompt_tokens: int
    """Includes image tokens, where the model has them in the prompt."""
    feature_bytes: int
    """Size of its image features at one exit, after the projector."""
    image_states: Tensor | None
    """(1, tokens, H) on the meta device, if the language model reads pictures by cross-attention."""
    media: Mapping[str, Tensor]
    """The encoder's inputs."""
    is_measured: bool
    """Whether it is from samples; otherwise a picture of 448 by 448 pixels and `TEXT_TOKENS` words are assumed."""


def typical_prompt(blueprint: Blueprint, samples: Sequence[Sample] = ()) -> Typical:
    """The largest prompt among the samples with the most videos, pictures and text; without samples, one picture and
    `TEXT_TOKENS` words.

    Raises:
        InputError: If a sample cannot be read.
    """
    if samples:
        likely = sorted(samples, key=_size, reverse=True)[:_PROBES]
        prompts = [blueprint.encode_prompt(sample) for sample in likely]
    else:
        prompts = [blueprint.probe(size=_SIZE, text="a picture " * (TEXT_TOKENS // 2))]
    prompt = max(prompts, key=lambda prompt: len(prompt.input_ids))
    model, media = blueprint.base_model, on_device(blueprint.base_model, prompt.media)
    features = compute_features(blueprint, media, (1,), skip_global=False)[1] if media else {}
    across = features["image"]["pooler_output"].flatten(0, 1)[None] if reads_across(model) and features else None
    return Typical(
        num_prompt_tokens=len(prompt.input_ids),
        feature_bytes=sum(tensor.nbytes for tensor in tensors_in(features)),
        image_states=across,
        media=media,
        is_measured=bool(samples),
    )


def _size(sample: Sample) -> tuple[int, ...]:
    return len(sample.videos), len(sample.images), len(sample.audios), len(sample.prompt)
