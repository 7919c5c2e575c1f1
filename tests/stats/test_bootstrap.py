from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from exitsafe.stats import percentile_interval, resampled_layer_means
from exitsafe.stats.bootstrap import mean_over


def test_each_resample_is_the_mean_of_samples_drawn_with_replacement() -> None:
    scores = np.array([[1.0, np.nan], [3.0, 5.0], [7.0, 9.0]])
    replicates = resampled_layer_means(scores, resamples=500)
    assert replicates.shape == (500, 2)
    # three draws of 1, 3 and 7: every mean is one of these sums over three
    sums = {(a + b + c) / 3 for a in (1, 3, 7) for b in (1, 3, 7) for c in (1, 3, 7)}
    assert all(min(abs(mean - known) for known in sums) < 1e-12 for mean in replicates[:, 0])


def test_layers_are_drawn_together() -> None:
    column = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    replicates = resampled_layer_means(np.stack([column, 1 - column], axis=1))
    assert replicates.sum(axis=1) == pytest.approx(np.ones(len(replicates)))


def test_a_resample_without_any_score_of_a_layer_has_no_mean_there() -> None:
    replicates = resampled_layer_means(np.array([[0.0, 4.0], [1.0, np.nan]]), resamples=200)
    chance = np.isnan(replicates[:, 1]).mean()  # both draws are the sample without a score: 1 / 4
    assert 0.15 < chance < 0.35
    assert set(replicates[~np.isnan(replicates[:, 1]), 1]) == {4.0}


def test_the_same_seed_draws_the_same_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random((30, 3))
    whole = resampled_layer_means(scores, resamples=50, seed=4)
    assert np.array_equal(whole, resampled_layer_means(scores, resamples=50, seed=4))
    assert not np.array_equal(whole, resampled_layer_means(scores, resamples=50, seed=5))
    monkeypatch.setattr("exitsafe.stats.bootstrap._CELLS_AT_ONCE", 7 * 30)
    monkeypatch.setattr("exitsafe.stats.bootstrap._CELLS_TO_KEEP", 0)
    assert np.allclose(whole, resampled_layer_means(scores, resamples=50, seed=4))


def test_no_samples_have_no_means() -> None:
    assert np.isnan(resampled_layer_means(np.empty((0, 2)), resamples=5)).all()


def test_interval_agrees_with_scipys_bootstrap() -> None:
    scores = np.random.default_rng(1).gamma(2.0, size=200)
    ours = percentile_interval(resampled_layer_means(scores[:, None], resamples=9999)[:, 0])
    theirs = scipy_stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_few_samples_move_the_percentiles_as_student_asks() -> None:
    # normal replicates of 5 samples: 2.7764 deviations (t with 4 degrees of freedom) times sqrt(5 / 4)
    replicates = scipy_stats.norm.ppf(np.linspace(0, 1, 1_000_001)[1:-1])
    assert percentile_interval(replicates, num_clusters=5) == pytest.approx((-3.1042, 3.1042), abs=1e-3)
    assert percentile_interval(replicates) == pytest.approx((-1.96, 1.96), abs=1e-3)


def test_clustered_intervals_cover_where_independent_ones_do_not() -> None:
    """Layers of one sample agree: 40 samples x 8 layers hold little more than 40 answers."""
    rng = np.random.default_rng(3)
    clustered = independent = 0
    for trial in range(200):
        scores = np.repeat(rng.random((40, 1)) < 0.4, 8, axis=1).astype(float)
        low, high = percentile_interval(
            resampled_layer_means(scores, resamples=400, seed=trial).mean(axis=1), num_clusters=40
        )
        clustered += low <= 0.4 <= high
        flat = scores.reshape(-1, 1)
        low, high = percentile_interval(resampled_layer_means(flat, resamples=400, seed=trial)[:, 0], num_clusters=320)
        independent += low <= 0.4 <= high
    assert clustered / 200 > 0.88
    assert independent / 200 < 0.7


def test_mean_over_skips_what_is_missing() -> None:
    means = mean_over(np.array([[1.0, 3.0], [np.nan, 5.0], [np.nan, np.nan]]))
    assert means[:2].tolist() == [2.0, 5.0]
    assert np.isnan(means[2])
