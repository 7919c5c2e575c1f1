"""The closed form against numbers by hand, against least squares with penalty rows, and on maps that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exitsafe.baselines.ridge import RIDGES, Moments, choose_ridge, fit_map, r_squared
from exitsafe.exits.translators import Translator


def drawn(num_tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """Tokens with unequal variances, correlations and a mean far from zero."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    scales = torch.logspace(-1, 1.5, width, dtype=torch.float64)
    return torch.randn(num_tokens, width, generator=rng, dtype=torch.float64) @ mix * scales + 7


def moments(x: Tensor, y: Tensor) -> Moments:
    found = Moments(x.shape[1])
    found.add(x, y)
    return found


def test_one_feature_by_hand() -> None:
    # x = 0, 2 and y = 1, 7: means 1 and 4, var x = 1, cov = 3; (3 - 1) / (1 + 1) = 1 on top of the identity's 1.
    found = fit_map(moments(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])), ridge=1.0)
    assert found.weight.item() == pytest.approx(2.0)
    assert found.bias.item() == pytest.approx(4.0 - 2.0 * 1.0)
    # predictions 2 and 6 for 1 and 7: squared error 2 of a total of 18
    r2 = r_squared(moments(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])), found)
    assert r2 == pytest.approx(1 - 2 / 18)


@pytest.mark.parametrize("ridge", RIDGES)
def test_least_squares_with_penalty_rows(ridge: float) -> None:
    x, noise = drawn(50, 4), drawn(50, 4, seed=1)
    y = 0.5 * x + 0.3 * noise - 2
    found = fit_map(moments(x, y), ridge=ridge)
    centred = (x - x.mean(0)).numpy()
    # |y - x - x D|² + n ridge sum_i var_i |D_i|², as plain least squares with one more row per feature
    rows = np.diag(np.sqrt(50 * ridge * centred.var(0)))
    target = ((y - y.mean(0)) - (x - x.mean(0))).numpy()
    change, *_ = np.linalg.lstsq(np.vstack([centred, rows]), np.vstack([target, np.zeros((4, 4))]), rcond=None)
    weight = np.eye(4) + change
    np.testing.assert_allclose(found.weight.numpy(), weight.T, rtol=1e-6, atol=1e-8)
    expected_bias = y.mean(0).numpy() - x.mean(0).numpy() @ weight
    np.testing.assert_allclose(found.bias.numpy(), expected_bias, rtol=1e-6, atol=1e-6)


def test_r_squared_equals_the_plain_sum_over_tokens() -> None:
    x, y = drawn(40, 3), drawn(40, 3, seed=2)
    found = fit_map(moments(x, y), ridge=0.1)
    fresh_x, fresh_y = drawn(30, 3, seed=3), drawn(30, 3, seed=4)
    predicted = fresh_x @ found.weight.T + found.bias
    plain = 1 - (fresh_y - predicted).square().sum() / (fresh_y - fresh_y.mean(0)).square().sum()
    assert r_squared(moments(fresh_x, fresh_y), found) == pytest.approx(plain.item(), rel=1e-9)


def test_a_known_linear_map_is_found() -> None:
    x = drawn(500, 6)
    known = Translator(
        weight=torch.randn(6, 6, generator=torch.Generator().manual_seed(5)), bias=torch.arange(6, dtype=torch.float32)
    )
    y = x @ known.weight.double().T + known.bias.double()
    found = fit_map(moments(x, y), ridge=1e-9)
    torch.testing.assert_close(found.weight, known.weight.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x @ found.weight.T + found.bias, y, rtol=1e-4, atol=1e-3)


def test_what_the_tokens_do_not_settle_stays_as_it_is() -> None:
    x = drawn(20, 3)
    x[:, 1] = 4.0  # never varies
    x[:, 2] = x[:, 0]  # says the same twice
    found = fit_map(moments(x, x), ridge=1e-3)
    torch.testing.assert_close(found.weight, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    shifted = fit_map(moments(x, x + 3), ridge=1e6)
    torch.testing.assert_close(shifted.weight, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(shifted.bias, torch.full((3,), 3.0, dtype=torch.float64), rtol=0, atol=1e-3)


def test_tokens_added_in_parts_and_sums_added_up_are_the_same() -> None:
    x, y = drawn(30, 4), drawn(30, 4, seed=1)
    parts = Moments(4)
    for start in range(0, 20, 7):
        parts.add(x[start : min(start + 7, 20)], y[start : min(start + 7, 20)])
    together = parts + moments(x[20:], y[20:])
    whole = moments(x, y)
    assert together.count == whole.count == 30
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(together, name), getattr(whole, name))
    assert whole.xx.dtype == torch.float64


def test_the_strength_is_the_best_on_held_out_tokens() -> None:
    noise = torch.Generator().manual_seed(9)
    x = drawn(12, 8)
    y = x + 30 * torch.randn(12, 8, generator=noise, dtype=torch.float64)  # few tokens, mostly noise: hold back
    fresh = drawn(400, 8, seed=3)
    held_out = moments(fresh, fresh + 30 * torch.randn(400, 8, generator=noise, dtype=torch.float64))
    ridge, r2 = choose_ridge(moments(x, y), held_out)
    scores = {each: r_squared(held_out, fit_map(moments(x, y), ridge=each)) for each in RIDGES}
    assert r2 == max(scores.values()) == scores[ridge]
    assert ridge > RIDGES[0]
    exact = moments(drawn(400, 8), drawn(400, 8) * 2)
    assert choose_ridge(exact, exact)[0] == RIDGES[0]
