"""Which responses share an optimiser step, and which of these a forward pass. Indices in, indices out.

The split is made once per batch of rollouts: old and reference log-probabilities are computed in the very forward
passes that the update repeats, so the ratio before the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Minibatch = list[list[int]]
"""One optimiser step: microbatches of row indices, their gradients added up."""


def split(
    sizes: Sequence[tuple[int, int]],
    keys: Sequence[object],
    *,
    minibatch_size: int,
    microbatch_tokens: int,
    rng: np.random.Generator,
) -> list[Minibatch]:
    """Deal rows at random into minibatches, and cut these into microbatches of few padding tokens.

    Args:
        sizes: (prompt tokens, response tokens) of each row.
        keys: Rows may share a forward pass when their keys are equal.
        minibatch_size: Rows per minibatch; the last may have fewer.
        microbatch_tokens: Padded tokens per microbatch; a longer row stands alone.
        rng: Deals the rows.
    """
    order = [int(row) for row in rng.permutation(len(sizes))]
    return [
        _cut(order[start : start + minibatch_size], sizes, keys, microbatch_tokens)
        for start in range(0, len(order), minibatch_size)
    ]


def _cut(
    rows: list[int], sizes: Sequence[tuple[int, int]], keys: Sequence[object], microbatch_tokens: int
) -> Minibatch:
    by_key: dict[object, list[int]] = {}
    for row in rows:
        by_key.setdefault(keys[row], []).append(row)
    microbatches: Minibatch = []
    for members in by_key.values():
        microbatches.append([])
        for row in sorted(members, key=lambda row: sum(sizes[row])):
            candidate = [*microbatches[-1], row]
            prompt, response = (max(sizes[member][part] for member in candidate) for part in (0, 1))
            if len(candidate) > 1 and len(candidate) * (prompt + response) > microbatch_tokens:
                microbatches.append([row])
            else:
                microbatches[-1] = candidate
    return microbatches
