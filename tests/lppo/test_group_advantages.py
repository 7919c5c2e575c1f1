"""GRPO's group baseline against numbers worked by hand and a slow plain loop."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from exitsafe.lppo.advantage import group_advantages
from exitsafe.lppo.metrics import group_metrics


def plain(scores: list[float], groups: list[int]) -> list[float]:
    """The definition, one answer after another."""
    advantages = []
    for score, group in zip(scores, groups, strict=True):
        mine = [other for other, its in zip(scores, groups, strict=True) if its == group]
        mean = sum(mine) / len(mine)
        advantages.append(score - mean)
    return advantages


def test_by_hand() -> None:
    scores = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 4.0])
    groups = torch.tensor([0, 1, 0, 0, 1, 2])
    mask = torch.tensor([[True, True, False]] * 6)
    # group 0: 1, -1, 1: mean 1/3; group 1: -1, 0: mean -1/2; group 2 has one answer left
    expected = [2 / 3, -0.5, -4 / 3, 2 / 3, 0.5, 0.0]
    advantages = group_advantages(scores, groups, mask)
    assert advantages[:, 0].tolist() == advantages[:, 1].tolist() == pytest.approx(expected)
    assert (advantages[:, 2] == 0).all()


@given(rows=st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(0, 4)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_equals_the_plain_loop(rows: list[tuple[float, int]]) -> None:
    scores, groups = [score for score, _ in rows], [group for _, group in rows]
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    tensors = torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)
    advantages = group_advantages(*tensors, mask)
    assert advantages[:, 1].tolist() == pytest.approx(plain(scores, groups), abs=1e-6)


def test_a_group_of_equal_scores_is_exactly_zero_and_counted() -> None:
    scores = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.5, 0.7, 0.7, -1.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 1, 3])
    mask = torch.ones(8, 1, dtype=torch.bool)
    advantages = group_advantages(scores, groups, mask)[:, 0]
    assert (advantages == 0).tolist() == [True, True, True, False, False, True, False, True]
    assert group_metrics(scores, groups) == {"num_equal_groups": 3}
