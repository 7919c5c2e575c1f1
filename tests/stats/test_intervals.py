from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from exitsafe.stats import constant_interval, wilson_interval


def test_wilson_by_hand() -> None:
    # k = 2, n = 10, z = 1.959964: centre (0.2 + z2 / 20) / (1 + z2 / 10), z2 = 3.841459
    z2 = 3.841458820694124
    centre = (0.2 + z2 / 20) / (1 + z2 / 10)
    half = math.sqrt(z2) / (1 + z2 / 10) * math.sqrt(0.2 * 0.8 / 10 + z2 / 400)
    assert wilson_interval(2, 10) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert wilson_interval(2, 10) == pytest.approx((0.0567, 0.5098), abs=5e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_statsmodels_and_holds_the_rate(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert (low, high) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_equal_values_get_wilsons_share_of_doubt() -> None:
    # Wilson's upper limit for 0 of 10: z2 / (10 + z2) = 3.841 / 13.841
    share = 3.841458820694124 / 13.841458820694124
    assert constant_interval(0.0, 10, bounds=(0, 1)) == pytest.approx((0, share))
    assert constant_interval(1.0, 10, bounds=(0, 1)) == pytest.approx((1 - share, 1))
    assert constant_interval(-1.0, 10, bounds=(-1, 1)) == pytest.approx((-1, share - 1))
    assert constant_interval(7.0, 10, bounds=None) == (7.0, 7.0)
