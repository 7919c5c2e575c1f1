"""gae and masked_whiten against numbers worked by hand and slow plain loops."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from exitsafe.lppo import gae, masked_whiten

TRUE = torch.ones(1, 3, dtype=torch.bool)


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition, by double loop: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(values))
    ]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]


def test_gae_by_hand() -> None:
    # gamma 0.5, lam 0.5: delta = [1 + .5*2 - 1, 0 + .5*4 - 2, 2 - 4] = [1, 0, -2]
    # A3 = -2; A2 = 0 + .25 * -2 = -.5; A1 = 1 + .25 * -.5 = .875
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, values, TRUE, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.875, -0.5, -2.0]]
    assert returns.tolist() == [[1.875, 1.5, 2.0]]


def test_gae_gamma_one_lambda_one_is_return_minus_value() -> None:
    rewards, values = torch.tensor([[0.25, 0.5, 1.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    advantages, returns = gae(rewards, values, TRUE, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[1.75, 1.5, 1.0]]
    assert advantages.tolist() == [[-1.25, -0.5, 0.0]]


rows = st.lists(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@given(rows=rows, gamma=st.floats(0, 1), lam=st.floats(0, 1), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_gae_equals_the_plain_loop_wherever_the_padding_is(
    rows: list[list[tuple[float, float]]], gamma: float, lam: float, left: int, right: int
) -> None:
    width = left + max(len(row) for row in rows) + right
    rewards = torch.full((len(rows), width), math.nan)  # what stands outside the mask must not be read
    values = torch.full((len(rows), width), math.nan)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, left : left + len(row)] = True
        rewards[i, mask[i]] = torch.tensor([r for r, _ in row])
        values[i, mask[i]] = torch.tensor([v for _, v in row])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, row in enumerate(rows):
        expected = plain_gae([r for r, _ in row], [v for _, v in row], gamma, lam)
        assert advantages[i, mask[i]].tolist() == pytest.approx(expected, abs=1e-4)
        with_values = [a + v for a, (_, v) in zip(expected, row, strict=True)]
        assert returns[i, mask[i]].tolist() == pytest.approx(with_values, abs=1e-4)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_whiten_by_hand() -> None:
    # masked 1, 3: mean 2, population variance 1 (the sample variance would be 2)
    x = torch.tensor([[1.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    assert masked_whiten(x, mask).tolist() == [[pytest.approx(-1.0), pytest.approx(1.0), 0.0]]
    kept = masked_whiten(x, mask, shift_mean=False)
    assert kept.tolist() == [[pytest.approx(1.0), pytest.approx(3.0), 0.0]]


@given(
    x=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12),
    pads=st.integers(0, 4),
    shift_mean=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_whiten_equals_the_plain_loop_and_ignores_padding(x: list[float], pads: int, shift_mean: bool) -> None:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    expected = [(value - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for value in x]
    padded = torch.tensor([x + [math.nan] * pads], dtype=torch.float64)
    mask = torch.tensor([[True] * len(x) + [False] * pads])
    whitened = masked_whiten(padded, mask, shift_mean=shift_mean)
    assert whitened[0, : len(x)].tolist() == pytest.approx(expected, abs=1e-6)
    assert whitened[0, len(x) :].tolist() == [0.0] * pads


def test_whiten_of_equal_numbers_is_zero_not_nan() -> None:
    assert masked_whiten(torch.full((1, 3), 0.5), TRUE).tolist() == [[0.0, 0.0, 0.0]]
