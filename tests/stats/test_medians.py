"""Bounds of a median against sums of binomial coefficients, and on times of several prompts."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from exitsafe.stats.medians import median_interval, median_upper_bound


def at_most(k: int, n: int) -> float:
    return float(sum(comb(n, i) for i in range(k + 1))) / 2.0**n


def test_order_statistics_by_hand() -> None:
    assert at_most(6, 24) <= 0.025 < at_most(7, 24)  # 7 values below, 7 above, stay outside
    assert median_interval(range(1, 25)) == (7.0, 18.0)
    assert at_most(7, 24) <= 0.05 < at_most(8, 24)
    assert median_upper_bound(range(1, 25), error=0.05) == 17.0


@pytest.mark.parametrize("error", [0.05, 0.05 / 96])
def test_too_few_values_have_no_bound(error: float) -> None:
    fewest = next(n for n in range(1, 20) if 0.5**n <= error)
    assert median_upper_bound(range(fewest), error=error) == fewest - 1
    assert median_upper_bound(range(fewest - 1), error=error) is None
    assert median_upper_bound([], error=error) is None
    assert median_interval([]) == (None, None)


def test_prompts_measured_equally_often_err_less() -> None:
    """Fast and slow prompts, half each: the count below their median varies less than a binomial."""
    rng = np.random.default_rng(0)
    centres = np.repeat([10.0, 11.0, 12.0, 13.0], 6)
    draws = centres + rng.normal(0, 1, (4000, 24))
    truth = float(np.median(centres + rng.normal(0, 1, (20000, 24))))
    bounds = np.sort(draws)[:, 16]  # the 17th of 24, as above
    assert median_upper_bound(list(draws[0]), error=0.05) == bounds[0]
    wrong = float(np.mean(bounds < truth))
    assert wrong < at_most(7, 24)
