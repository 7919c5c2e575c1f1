"""Which responses share an optimiser step, and which of these a forward pass.

The split is made once per batch of rollouts: old and reference log-probabilities are computed in the very forward
passes that the update repeats, so the ratio before the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
from torch import Tensor

from exitsafe.engine.packing import sibling_groups
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.lppo.batch_sizes import BatchSizes
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.policy import pack_size
from exitsafe.machine.memory import BatchSize

Result = TypeVar("Result")
Minibatch = list[list[int]]
"""One optimiser step: microbatches of row indices, their gradients added up."""
Passes = list[tuple[list[int], bool]]
"""Forward passes: the rows of each, and whether it counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Responses to rows, dealt into minibatches and microbatches."""

    rows: list[Row]
    responses: list[Tensor]  # token ids, (length,) each
    minibatches: list[Minibatch]
    shares: list[list[Minibatch]]  # of each minibatch, the part of each process; [] for a pass that does not count
    microbatch: BatchSize  # padded tokens per forward pass; halved when memory runs out
    num_tokens: int  # of a microbatch, when these were dealt

    def in_passes(self, index: int, team: Team, work: Callable[[Passes], Result]) -> Result:
        """Call `work` with this process's forward passes for minibatch `index`, and again with all of them cut in two
        when memory runs out. Returns its result.

        A pass that does not count uses a row of the same minibatch, so it uses no other weights than the others.

        Raises:
            RunError: If memory runs out with a single row.
        """
        some_row = self.minibatches[index][0][:1]
        own = [(rows or some_row, bool(rows)) for rows in self.shares[index][team.number]]

        def cut(size: int) -> Result:
            passes: Passes = []
            for rows, counts in own:
                num_rows = max(1, len(rows) * size // self.num_tokens)
                passes += [(rows[start : start + num_rows], counts) for start in range(0, len(rows), num_rows)]
            return work(passes)

        largest = max((len(rows) for rows, _ in own), default=1)
        return self.microbatch.run(cut, least=self.num_tokens // largest)

    def places(self, team: Team) -> list[int]:
        """The rows that this process evaluates."""
        return [
            place
            for minibatch, shares in zip(self.minibatches, self.shares, strict=True)
            for rows in shares[team.number]
            for place in rows or minibatch[0][:1]
        ]


def deal(
    vlm: VLM,
    rows: Sequence[Row],
    responses: Sequence[Tensor],
    *,
    config: LPPOConfig,
    rng: np.random.Generator,
    team: Team = ALONE,
    microbatch: BatchSize | None = None,
) -> Batch:
    """Split rows and their responses for the whole step; responses that are packed together stay together.

    The minibatches do not depend on the number of processes; how they are cut does.

    Args:
        vlm: Says which rows may share a forward pass.
        rows, responses: Prompts with exit layers, and token ids `(length,)` for each.
        config: For the sizes of minibatches and groups.
        rng: Deals the rows.
        team: The processes.
        microbatch: Padded tokens per forward pass, the same in every process; None takes the config's.
    """
    microbatch = microbatch or BatchSizes(config, team).microbatch
    sizes = [(len(row.prompt.input_ids), len(response)) for row, response in zip(rows, responses, strict=True)]
    groups = sibling_groups(rows, pack_size(vlm, config))
    minibatches = split(
        sizes,
        [vlm.batch_key(row.prompt) for row in rows],
        groups,
        minibatch_size=config.minibatch_size,
        microbatch_tokens=microbatch.most,
        rng=rng,
        num_shares=team.size,
    )
    shares = [share_out(minibatch, sizes, team.size) for minibatch in minibatches]
    if team.is_sharded:  # every process must run as many passes
        for among in shares:
            most = max(len(share) for share in among)
            among[:] = [share + [[]] * (most - len(share)) for share in among]
    microbatch.fits = max(
        padded_tokens(minibatch, sizes, groups) for minibatch in minibatches
    )  # halving starts from here
    return Batch(
        rows=list(rows),
        responses=list(responses),
        minibatches=minibatches,
        shares=shares,
        microbatch=microbatch,
        num_tokens=microbatch.size,
    )


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
    """Deal groups of rows at random into minibatches, and cut these into microbatches with little padding.

    Args:
        sizes: (prompt tokens, response tokens) of each row.
        keys: Rows may share a forward pass when their keys are equal.
        groups: Rows that share one prompt, and one sequence in the forward pass; every row is in one group.
        minibatch_size: Rows per minibatch; the last may have fewer, and one may have more to keep a group whole.
        microbatch_tokens: Padded tokens per microbatch; a longer group is cut, a longer row is alone.
        rng: Deals the groups.
        num_shares: Number of processes that share the microbatches of a minibatch, which are cut small enough to give
            each of them some. Which rows are in a minibatch does not depend on it.
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
    """Deal a minibatch's microbatches to processes: the largest first, each to the process with the least so far.

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
        largest = max(largest, _padded_size(sequences, sizes))
    return largest


def _tokens_of_a_share(
    groups: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], microbatch_tokens: int, num_shares: int
) -> int:
    if num_shares == 1:
        return microbatch_tokens
    lengths = [sum(_packed_size(group, sizes)) for group in groups]
    return min(
        microbatch_tokens, max(sum(lengths) // num_shares, max(lengths))
    )  # no group is cut for the sake of the others


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
            if len(candidate) > 1 and _padded_size(candidate, sizes) > microbatch_tokens:
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


def _padded_size(sequences: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of a forward pass over packed sequences: prompts and responses are padded to the longest of each."""
    packed = [_packed_size(rows, sizes) for rows in sequences]
    return len(packed) * (max(prompt for prompt, _ in packed) + max(responses for _, responses in packed))
