"""The samples of each step, and their exit layers.

The whole schedule is drawn from the seed at the start: step s is row s of it. So nothing that happens in a step can
change a later draw, and a resumed run needs only its step number.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exitsafe.errors import InputError
from exitsafe.exits.layers import resolve_layers
from exitsafe.lppo.config import LPPOConfig
from exitsafe.records import KINDS, Sample


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Indices into the samples and exit layers, both `(num_steps, batch_size)`."""

    sample_indices: NDArray[np.int64]
    exit_layers: NDArray[np.int64]


def draw_schedule(samples: Sequence[Sample], exit_layers: Sequence[int], config: LPPOConfig) -> Schedule:
    """Draw all steps of a run.

    Each step has the kinds in the shares of the mix, to within one sample; within a kind, every sample is drawn once
    before any is drawn again; the exit layer of each draw is uniform and independent of the rest. Each draw fills
    `config.group_size` adjacent places: i * G to i * G + G - 1 are one group.

    Raises:
        InputError: If there are no samples, ids are not unique, or the mix asks for a kind that is missing.
    """
    _check_ids(samples)
    shape = (config.num_steps, config.batch_size // config.group_size)
    kinds = _draw_kinds(_shares(samples, config), shape, np.random.default_rng((config.seed, 1)))
    sample_indices = np.empty(shape, dtype=np.int64)
    for k, kind in enumerate(KINDS):
        members = np.array([i for i, sample in enumerate(samples) if sample.kind == kind], dtype=np.int64)
        places = np.nonzero(kinds == k)
        rng = np.random.default_rng((config.seed, 2, k))
        sample_indices[places] = _passes(members, len(places[0]), rng)
    layer_rng = np.random.default_rng((config.seed, 3))
    drawn_layers = layer_rng.choice(np.array(exit_layers, dtype=np.int64), size=shape)
    return Schedule(
        sample_indices=sample_indices.repeat(config.group_size, axis=1),
        exit_layers=drawn_layers.repeat(config.group_size, axis=1),
    )


def trained_exits(config: LPPOConfig, *, num_layers: int, default_exit: int) -> tuple[int, ...]:
    """The exit layers that the config names for this encoder, ascending, each once.

    Raises:
        ExitLayerError: If a layer does not exist in the encoder.
        InputError: If the text that names them cannot be parsed.
    """
    named = resolve_layers(config.exit_layers, num_layers=num_layers, default_exit=default_exit)
    return tuple(sorted({*named, default_exit})) if config.include_default else named


def warn_of_harmful_only(samples: Sequence[Sample], config: LPPOConfig) -> None:
    """Warn if all samples are harmful and the mix does not say so: refusing everything is then the best policy."""
    if config.mix is None and all(sample.kind == "harmful" for sample in samples):
        warnings.warn(
            "all training samples are harmful, so the model can learn to refuse everything: add benign, borderline or "
            "vqa samples, or accept this with mix: {harmful: 1}",
            stacklevel=3,
        )


def _check_ids(samples: Sequence[Sample]) -> None:
    if not samples:
        raise InputError("no samples to train on")
    name, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} samples have the id {name!r}: ids must be unique, random numbers are keyed by them")


def _shares(samples: Sequence[Sample], config: LPPOConfig) -> list[float]:
    """Share of each of `KINDS` in a batch; they sum to 1."""
    counts = [sum(sample.kind == kind for sample in samples) for kind in KINDS]
    if config.mix is None:
        return [count / len(samples) for count in counts]
    for kind, count in zip(KINDS, counts, strict=True):
        if config.mix.get(kind, 0) > 0 and count == 0:
            raise InputError(
                f"mix asks for {kind} samples, but none was given: add some, or set its share to 0 "
                "(the field mix, in --config FILE.yaml)"
            )
    total = sum(config.mix.values())
    return [config.mix.get(kind, 0) / total for kind in KINDS]


def _draw_kinds(shares: list[float], shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Index into `KINDS` of each place: one random offset per step into evenly spaced points (systematic
    sampling), so that a rare kind is neither missed nor clustered."""
    num_steps, batch_size = shape
    points = (np.arange(batch_size) + rng.random((num_steps, 1))) / batch_size
    kinds = np.searchsorted(np.cumsum(shares), points, side="right")
    last_drawn = max(k for k, share in enumerate(shares) if share > 0)  # the sum may round to just under 1
    return np.minimum(kinds, last_drawn)


def _passes(members: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` members, in one random order after another."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    num_passes = -(-count // len(members))
    return np.concatenate([rng.permutation(members) for _ in range(num_passes)])[:count]
