"""Splitting: every row once, the sizes asked for, few padded tokens, keys apart."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from exitsafe.lppo.minibatches import split


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=20),
    minibatch_size=st.integers(1, 8),
    microbatch_tokens=st.integers(1, 120),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=80)
def test_every_row_once_within_the_budget(
    sizes: list[tuple[int, int]], minibatch_size: int, microbatch_tokens: int, seed: int
) -> None:
    keys = [size[0] % 2 for size in sizes]
    minibatches = split(
        sizes,
        keys,
        minibatch_size=minibatch_size,
        microbatch_tokens=microbatch_tokens,
        rng=np.random.default_rng(seed),
    )
    rows = [[row for part in minibatch for row in part] for minibatch in minibatches]
    assert sorted(row for minibatch in rows for row in minibatch) == list(range(len(sizes)))
    assert all(len(minibatch) == minibatch_size for minibatch in rows[:-1])
    for part in (part for minibatch in minibatches for part in minibatch):
        assert len({keys[row] for row in part}) == 1
        padded = len(part) * (max(sizes[row][0] for row in part) + max(sizes[row][1] for row in part))
        assert len(part) == 1 or padded <= microbatch_tokens


def test_no_more_parts_than_needed_and_the_seed_decides() -> None:
    sizes = [(5, 5)] * 8

    def parts(seed: int) -> list[list[list[int]]]:
        return split(sizes, [None] * 8, minibatch_size=4, microbatch_tokens=20, rng=np.random.default_rng(seed))

    assert [[len(part) for part in minibatch] for minibatch in parts(0)] == [[2, 2], [2, 2]]
    assert parts(0) == parts(0)
    assert parts(0) != parts(1)
