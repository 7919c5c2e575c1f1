from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from exitsafe.gate.rare import change_margin, score_interval
from exitsafe.stats import wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(1, 73), (5, 20), (62, 200), (199, 200)])
def test_of_zeros_and_ones_it_is_wilsons_interval(successes: int, n: int) -> None:
    values = np.array([1.0] * successes + [0.0] * (n - successes))
    assert score_interval(values) == pytest.approx(wilson_interval(successes, n))


def test_numbers_that_spread_half_as_much_are_worth_twice_as_many_samples() -> None:
    # two exits that succeed on different samples: mean 0.5, variance 1/8 instead of 1/4
    values = np.array([0.0, 0.5, 0.5, 1.0] * 10)
    assert score_interval(values) == pytest.approx(wilson_interval(40, 80))


def test_a_change_in_one_direction_has_wilsons_upper_limit() -> None:
    assert 2 / 100 + change_margin(2 / 100, 0.0, 100) == pytest.approx(wilson_interval(2, 100)[1])
    assert change_margin(0.0, 0.0, 73) == pytest.approx(wilson_interval(0, 73)[1])


def test_a_change_in_both_directions_by_hand() -> None:
    # gained 6%, lost 2% of 100: Wilson's ends are 12.477% and 0.550%; 0.04 + sqrt(0.06477^2 + 0.0145^2)
    assert 0.04 + change_margin(0.06, 0.02, 100) == pytest.approx(0.04 + np.hypot(0.06477, 0.01450), abs=2e-5)


@pytest.mark.parametrize(("gained", "lost"), [(0.05, 0.0), (0.08, 0.03), (0.15, 0.10)])
@pytest.mark.parametrize("n", [73, 128, 200])
def test_a_change_at_the_limit_passes_in_at_most_a_thirtieth(n: int, gained: float, lost: float) -> None:
    """Summed over all outcomes, exactly: no simulation."""
    passes = sum(
        binom.pmf(more, n, gained) * binom.pmf(less, n - more, lost / (1 - gained))
        for more in range(n // 2)
        for less in range(n // 2)
        if (more - less) / n + change_margin(more / n, less / n, n) <= gained - lost
    )
    assert 0.005 < passes < 0.034
