"""Which responses share an optimiser step, and which of these a forward pass. Indices in, indices out.

The split is made once per batch of rollouts: old and reference log-probabilities are computed in the very forward
passes that the update repeats, so the ratio before the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

Minibatch = list[list[int]]
"""One optimiser step: microbatches of row indices, their gradients added up."""


def split(
    sizes: Sequence[tuple[int, int]],
    keys: Sequence[object],
    groups: Sequence[Sequence[int]],
    *,
    minibatch_size: int,
    microbatch_tokens: int,
    rng: np.random.Generator,
    num_shares: int = 1,
) -> list[Minibatch]:
    """Deal groups of rows at random into minibatches, and cut these into microbatches of few padding tokens.

    Args:
        sizes: (prompt tokens, response tokens) of each row.
        keys: Rows may share a forward pass when their keys are equal.
        groups: Rows that share one prompt's tokens, one sequence in the forward pass; every row once.
        minibatch_size: Rows per minibatch; the last may have fewer, and one that a group overfills a few more.
        microbatch_tokens: Padded tokens per microbatch; a longer group is cut, a longer row stands alone.
        rng: Deals the groups.
        num_shares: So many processes share the microbatches of a minibatch: these are cut small enough for all of them.
            What stands in a minibatch does not depend on it.
    """
    minibatches: list[list[Sequence[int]]] = []
    num_rows = minibatch_size
    for index in rng.permutation(len(groups)):
        if num_rows >= minibatch_size:
            minibatches.append([])
            num_rows = 0
        minibatches[-1].append(groups[index])
        num_rows += len(groups[index])
    return [
        _cut(dealt, sizes, keys, _tokens_of_a_share(dealt, sizes, microbatch_tokens, num_shares))
        for dealt in minibatches
    ]


def share_out(minibatch: Minibatch, sizes: Sequence[tuple[int, int]], num_shares: int) -> list[Minibatch]:
    """Deal a minibatch's microbatches to processes: the largest first, each to the one that has least so far.

    Args:
        sizes: As in `split`.
        num_shares: Processes.
    """
    shares: list[Minibatch] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for microbatch in sorted(minibatch, key=lambda rows: -_num_tokens(rows, sizes)):  # ties in their order
        lightest = loads.index(min(loads))
        shares[lightest].append(microbatch)
        loads[lightest] += _num_tokens(microbatch, sizes)
    return [sorted(share, key=minibatch.index) for share in shares]


def padded_tokens(minibatch: Minibatch, sizes: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]]) -> int:
    """Tokens of a minibatch's largest microbatch, padding included; the arguments are those of `split`."""
    group_of = {row: number for number, group in enumerate(groups) for row in group}
    largest = 0
    for microbatch in minibatch:
        sequences = [list(rows) for _, rows in groupby(microbatch, key=group_of.__getitem__)]
        packed = [_packed_size(rows, sizes) for rows in sequences]
        largest = max(largest, len(packed) * sum(max(size[part] for size in packed) for part in (0, 1)))
    return largest


def _tokens_of_a_share(
    groups: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], microbatch_tokens: int, num_shares: int
) -> int:
    if num_shares == 1:
        return microbatch_tokens
    lengths = [sum(_packed_size(group, sizes)) for group in groups]
    return min(microbatch_tokens, max(sum(lengths) // num_shares, max(lengths)))  # no group is cut for the others' sake


def _num_tokens(rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    return sum(sum(sizes[row]) for row in rows)


def _cut(
    groups: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], keys: Sequence[object], microbatch_tokens: int
) -> Minibatch:
    by_key: dict[object, list[list[int]]] = {}
    for group in groups:
        by_key.setdefault(keys[group[0]], []).extend(_sequences(group, sizes, microbatch_tokens))
    microbatches: list[list[list[int]]] = []
    for sequences in by_key.values():
        microbatches.append([])
        for sequence in sorted(sequences, key=lambda sequence: sum(_packed_size(sequence, sizes))):
            candidate = [*microbatches[-1], sequence]
            packed = [_packed_size(member, sizes) for member in candidate]
            prompt, responses = (max(size[part] for size in packed) for part in (0, 1))
            if len(candidate) > 1 and len(candidate) * (prompt + responses) > microbatch_tokens:
                microbatches.append([sequence])
            else:
                microbatches[-1] = candidate
    return [[row for sequence in microbatch for row in sequence] for microbatch in microbatches]


def _sequences(group: Sequence[int], sizes: Sequence[tuple[int, int]], microbatch_tokens: int) -> list[list[int]]:
    """A group whole or, if it is too long for a microbatch, in parts that fit."""
    parts: list[list[int]] = [[]]
    for row in group:
        if parts[-1] and sum(_packed_size([*parts[-1], row], sizes)) > microbatch_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def _packed_size(rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Prompt tokens, which the rows share, and response tokens."""
    return sizes[rows[0]][0], sum(sizes[row][1] for row in rows)
