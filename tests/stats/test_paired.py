from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from exitsafe.stats import bootstrap_p_value, holm, mcnemar_exact, percentile_interval, resampled_layer_means


def test_mcnemar_by_hand() -> None:
    # 1 gained of 6 that changed: 2 * (1 + 6) / 2 ** 6
    assert mcnemar_exact(1, 5) == pytest.approx(14 / 64)
    assert mcnemar_exact(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(0, 0) == 1.0


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_statsmodels(gained: int, lost: int) -> None:
    expected = mcnemar(np.array([[5, gained], [lost, 5]]), exact=True).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(min(1.0, expected))
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_holm_by_hand() -> None:
    # sorted 0.01 0.02 0.04 0.3 times 4 3 2 1: 0.04 0.06 0.08 0.3
    assert holm([0.3, 0.01, 0.04, 0.02]) == pytest.approx([0.3, 0.04, 0.08, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize("num_tests", [1, 2, 24])
def test_holm_equals_statsmodels(num_tests: int) -> None:
    rng = np.random.default_rng(num_tests)
    for p_values in (rng.random(num_tests), rng.random(num_tests) ** 4, np.round(rng.random(num_tests), 1)):
        adjusted = holm(list(p_values))
        assert adjusted == pytest.approx(multipletests(p_values, method="holm")[1])
        assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_bootstrap_p_value_by_hand() -> None:
    # 1 of 9 at or below 0: 2 * (1 + 1) / (1 + 9); a resample without a value does not count
    draws, many = np.array([1.0] * 8 + [-1.0, np.nan]), 10**9
    assert bootstrap_p_value(draws, num_clusters=many) == pytest.approx(0.4)
    assert bootstrap_p_value(np.zeros(9), num_clusters=many) == 1.0
    assert bootstrap_p_value(np.ones(1999), num_clusters=many) == pytest.approx(0.001)
    # of 2 samples a share of 0.2 is z = -0.8416, t = z / sqrt(2) with one degree of freedom: 2 (1/2 + atan(t) / pi)
    assert bootstrap_p_value(draws, num_clusters=2) == pytest.approx(2 * (0.5 + math.atan(-0.5951) / math.pi), abs=1e-4)
    assert bootstrap_p_value(draws, num_clusters=1) == 1.0


@pytest.mark.parametrize("num_samples", [5, 12, 60])
def test_bootstrap_p_value_and_interval_agree(num_samples: int) -> None:
    rng = np.random.default_rng(num_samples)
    for shift in np.linspace(0, 1.2, 13):
        changes = (rng.standard_normal(num_samples) + shift)[:, None]
        replicates = resampled_layer_means(changes)[:, 0]
        low, high = percentile_interval(replicates, num_clusters=num_samples)
        p_value = bootstrap_p_value(replicates, num_clusters=num_samples)
        assert (p_value < 0.05) == (low > 0 or high < 0) or abs(p_value - 0.05) < 0.005
