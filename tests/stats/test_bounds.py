"""Bounds far out in the tail and of rare events: exact coverage at every rate, worked numbers, graded scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from exitsafe.stats import wilson_interval
from exitsafe.stats.bounds import change_margin, lower_bound, score_interval, upper_bound

ERRORS = (0.05, 0.05 / 24, 0.05 / 96)


@pytest.mark.parametrize("is_graded", [False, True])
def test_none_of_n_by_hand(is_graded: bool) -> None:
    """(1 - m)^n = error solved for m, by either method."""
    found = upper_bound(0, 128, error=0.05 / 24, is_graded=is_graded)
    assert found == pytest.approx(1 - (0.05 / 24) ** (1 / 128))
    assert upper_bound(128, 128, error=0.05, is_graded=is_graded) == 1.0
    assert lower_bound(128, 128, error=0.05 / 24, is_graded=is_graded) == pytest.approx(1 - found)


def test_nothing_scored_says_nothing() -> None:
    assert (lower_bound(0, 0, error=0.05), upper_bound(0, 0, error=0.05)) == (0.0, 1.0)


@pytest.mark.parametrize("n", [16, 50, 128])
@pytest.mark.parametrize("error", ERRORS)
def test_the_error_is_kept_at_every_rate(n: int, error: float) -> None:
    uppers = np.array([upper_bound(total, n, error=error) for total in range(n + 1)])
    lowers = np.array([lower_bound(total, n, error=error) for total in range(n + 1)])
    for rate in np.linspace(0.005, 0.995, 199):
        chances = binom.pmf(np.arange(n + 1), n, rate)
        assert chances[uppers < rate].sum() <= error * (1 + 1e-9)
        assert chances[lowers > rate].sum() <= error * (1 + 1e-9)


def test_why_not_wilson() -> None:
    """Made for a choice among 24 exits and four bounds, its lower bound of a small rate errs six times as often."""
    error, n, rate = 0.05 / 96, 50, 0.05
    lowers = np.array(
        [
            binomtest(total, n, alternative="greater").proportion_ci(1 - error, method="wilson").low
            for total in range(n + 1)
        ]
    )
    assert binom.pmf(np.arange(n + 1), n, rate)[lowers > rate].sum() > 5 * error


def test_graded_scores_are_bounded_more_widely_than_yes_and_no() -> None:
    for total in (1, 7, 20, 39):
        assert upper_bound(total, 40, error=0.001, is_graded=True) > upper_bound(total, 40, error=0.001)
        assert lower_bound(total, 40, error=0.001, is_graded=True) < lower_bound(total, 40, error=0.001)


def test_graded_scores_keep_the_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], p=[0.6, 0.1, 0.1, 0.1, 0.1], size=(4000, 30))
    truth = 0.1 * (0.3 + 0.6 + 0.9 + 1.0)
    wrong = [upper_bound(total, 30, error=0.05, is_graded=True) < truth for total in scores.sum(axis=1)]
    assert 0 < np.mean(wrong) < 0.05


def test_three_or_more_bounds_at_once_are_wider_than_a_gates() -> None:
    """docs/statistics.md says so; one or two need not be."""
    for n in (10, 52, 73, 128, 400):
        for successes in range(n + 1):
            assert upper_bound(successes, n, error=0.05 / 3) >= wilson_interval(successes, n)[1]
    assert upper_bound(0, 52, error=0.05 / 2) < wilson_interval(0, 52)[1]


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
