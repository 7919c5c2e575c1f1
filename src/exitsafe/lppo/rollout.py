"""Answers sampled from the policy, rows of all exit layers side by side. Knows nothing about rewards or losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exitsafe.lppo.config import LPPOConfig
from exitsafe.records import Response, Sample
from exitsafe.vlm import VLM, Row


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One sampled answer. The row carries the exit layer, whose features everything after this reads too."""

    sample: Sample
    row: Row
    token_ids: Tensor  # (T,) int64, the end-of-sequence token included
    response: Response


def rollout(
    vlm: VLM, samples: Sequence[Sample], rows: Sequence[Row], *, config: LPPOConfig, draw: int
) -> list[Trajectory]:
    """Sample one answer per row from the whole distribution but special tokens.

    Args:
        vlm: The policy.
        samples: One per row.
        rows: Prompts with the features of their exit layers.
        config: For temperature, length and seed.
        draw: Differs between calls: with seed, sample and exit layer it keys the random numbers.
    """
    trajectories: dict[int, Trajectory] = {}
    for repetition, places in enumerate(_repetitions(rows)):
        completions = vlm.complete(
            [rows[place] for place in places],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            batch_size=config.rollout_batch_size,
            draw=draw * len(rows) + repetition,
            suppress=vlm.special_token_ids,
        )
        for index, completion in completions:
            place = places[index]
            trajectories[place] = Trajectory(
                sample=samples[place],
                row=rows[place],
                token_ids=torch.tensor(completion.token_ids, dtype=torch.int64),
                response=vlm.response(rows[place], completion),
            )
    return [trajectories[place] for place in range(len(rows))]


def _repetitions(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the first, second, ... occurrence of each (sample, exit layer): these need draws of their own."""
    groups: list[list[int]] = []
    seen: dict[tuple[str, int], int] = {}
    for place, row in enumerate(rows):
        key = (row.prompt.sample_id, row.exit_layer)
        repetition = seen.get(key, 0)
        seen[key] = repetition + 1
        if repetition == len(groups):
            groups.append([])
        groups[repetition].append(place)
    return groups
