"""How often the gate lets a model pass whose measure is exactly at the limit: the numbers of docs/gate.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from exitsafe.gate.evidence import _wider
from exitsafe.stats import resampled_layer_means, wilson_interval
from exitsafe.stats.bootstrap import Floats, clustered_interval

LIMIT = 0.05
Draw = Callable[[np.random.Generator, int], Floats]


def _most_that_pass(n: int, limit: float) -> int:
    """The most successes of n whose bound is within the limit."""
    return int(sum(wilson_interval(k, n)[1] <= limit for k in range(int(n * limit) + 1))) - 1


def test_at_an_exit_the_level_is_kept_exactly() -> None:
    for limit in (0.02, 0.05, 0.1, 0.2):
        for n in range(189, 260, 7):
            assert 0.0 < binom.cdf(_most_that_pass(n, limit), n, limit) < 0.032


def test_the_table_of_how_often_a_sound_exit_passes() -> None:
    found = {
        n: [round(float(binom.cdf(_most_that_pass(n, LIMIT), n, rate)), 2) for rate in (0.005, 0.01, 0.02, 0.03)]
        for n in (73, 128, 200, 400, 800)
    }
    assert found == {
        73: [0.69, 0.48, 0.23, 0.11],
        128: [0.87, 0.63, 0.27, 0.10],
        200: [0.98, 0.86, 0.43, 0.15],
        400: [1.0, 1.0, 0.89, 0.46],
        800: [1.0, 1.0, 1.0, 0.77],
    }


def _alike(rng: np.random.Generator, n: int) -> Floats:
    return (rng.random(n) < LIMIT).astype(np.float64)


def _independent(rng: np.random.Generator, n: int) -> Floats:
    means: Floats = (rng.random((n, 3)) < LIMIT).mean(axis=1)
    return means


def _hard_samples(rng: np.random.Generator, n: int) -> Floats:
    """A tenth of the samples succeeds half of the time at each exit, the others never."""
    means: Floats = (rng.random((n, 3)) < np.where(rng.random(n) < 0.1, 0.5, 0.0)[:, None]).mean(axis=1)
    return means


def _rubric(rng: np.random.Generator, n: int) -> Floats:
    return rng.choice([0.0, 0.25, 0.5, 1.0], size=n, p=[0.9, 0.04, 0.04, 0.02])


def _toxicity(rng: np.random.Generator, n: int) -> Floats:
    return rng.beta(0.5, 9.5, size=n)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [_alike, _independent, _hard_samples, _rubric, _toxicity])
@pytest.mark.parametrize("n", [73, 128, 200])
def test_bins_and_means_at_the_limit_rarely_pass(draw: Draw, n: int) -> None:
    rng = np.random.default_rng(n)
    passes = {"bootstrap": 0, "gate": 0}
    audits = 1000
    for _ in range(audits):
        means = draw(rng, n)
        replicates = resampled_layer_means(means[:, None])[:, 0]
        _, high = clustered_interval(float(means.mean()), replicates, num_clusters=n, bounds=(0.0, 1.0))
        passes["bootstrap"] += high <= LIMIT
        passes["gate"] += _wider(high, means, is_max=True) <= LIMIT
    print(draw.__name__, n, {name: count / audits for name, count in passes.items()})
    assert passes["gate"] / audits < 0.065
    if (draw, n) == (_alike, 73):
        assert passes["bootstrap"] / audits > 0.07
