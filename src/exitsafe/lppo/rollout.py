"""Answers sampled from the policy, rows of all exit layers in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.sharding import in_step
from exitsafe.machine.memory import BatchSize
from exitsafe.records import Response, Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One sampled answer. Its row has the exit layer, whose features all later steps read too."""

    sample: Sample
    row: Row
    token_ids: Tensor  # (T,) int64, the end-of-sequence token included
    response: Response


def rollout(
    vlm: VLM,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    *,
    config: LPPOConfig,
    draw: int,
    team: Team = ALONE,
    batch_size: BatchSize | None = None,
) -> list[Trajectory]:
    """Sample one answer per row from the whole distribution except special tokens; each process does its share.

    Args:
        vlm: The policy.
        samples: One per row.
        rows: Prompts with the features of their exit layers, which are needed at this process's own places only.
        config: Temperature, length and seed.
        draw: Differs between calls. With seed, sample and exit layer it keys the random numbers.
        team: The processes.
        batch_size: Rows generated at a time, halved when memory runs out; None takes the config's.
    """
    numbered = [replace(row, draw=number) for row, number in zip(rows, _repetitions(rows), strict=True)]
    own = team.places(len(rows), group_size=config.group_size)
    with in_step(vlm, team):
        completions = vlm.complete(
            [numbered[place] for place in own],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            batch_size=batch_size or config.rollout_batch_size,
            draw=draw * len(rows),
            suppress=vlm.special_token_ids,
        )
        answers = {own[index]: (c.token_ids, vlm.response(rows[own[index]], c)) for index, c in completions}
    return [
        Trajectory(sample=sample, row=row, token_ids=torch.tensor(token_ids, dtype=torch.int64), response=response)
        for sample, row, (token_ids, response) in zip(samples, rows, team.merge(answers), strict=True)
    ]


def _repetitions(rows: Sequence[Row]) -> list[int]:
    """For each row, how many earlier rows have its sample and exit layer: they must be drawn differently."""
    seen: Counter[tuple[str, int]] = Counter()
    repetitions = []
    for row in rows:
        key = (row.prompt.sample_id, row.exit_layer)
        repetitions.append(seen[key])
        seen[key] += 1
    return repetitions
