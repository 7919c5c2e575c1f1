from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exitsafe.stats import PairedScores

NAN = np.nan


def _paired(before: np.ndarray, after: np.ndarray, bounds: tuple[float, float] | None = (0, 1)) -> PairedScores:
    unscored = np.isnan(before) | np.isnan(after)
    return PairedScores(before, after, unscored, exit_layers=range(1, before.shape[1] + 1), bounds=bounds)


def test_pairs_by_hand() -> None:
    before = np.array([[1.0, 1.0, NAN], [1.0, 0.0, NAN], [0.0, 1.0, NAN], [1.0, NAN, 1.0]])
    after = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, NAN, NAN], [1.0, 1.0, NAN]])
    scores = _paired(before, after)
    first, second = scores.layers().values()
    assert (first.before, first.after, first.n, first.unscored) == (0.75, 0.5, 4, 0)
    assert (first.gained, first.lost, first.p_value, first.test) == (1, 2, 1.0, "mcnemar")
    assert (second.before, second.after, second.n, second.unscored) == (0.5, 0.0, 2, 2)
    assert scores.unscored_layers() == {3: 4}
    bins = scores.bins(3)
    assert list(bins) == ["early", "middle", "average"]
    assert bins["average"].difference == pytest.approx((-0.25 - 0.5) / 2)
    assert (bins["average"].n, bins["average"].test) == (6, "bootstrap")


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float64, (5, 3), elements=st.sampled_from([0.0, 1.0, NAN])),
    arrays(np.float64, (5, 3), elements=st.sampled_from([0.0, 1.0, NAN])),
)
def test_swapping_the_runs_turns_every_sign(before: np.ndarray, after: np.ndarray) -> None:
    there, back = _paired(before, after).layers(), _paired(after, before).layers()
    assert there.keys() == back.keys()
    for one, other in zip(there.values(), back.values(), strict=True):
        assert one.difference == -other.difference
        assert (one.gained, one.lost, one.n) == (other.lost, other.gained, other.n)
        assert one.p_value == other.p_value
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert one.low <= one.difference <= one.high


def test_intervals_of_differences_cover() -> None:
    """True rates 0.6 and 0.4 with a shared part: 95% intervals of 80 pairs should hold -0.2."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(150):
        ease = rng.random((80, 1))
        before = ((ease + rng.random((80, 2))) / 2 < 0.5528).astype(float)  # P(mean of two uniforms < x) = 0.6
        after = ((ease + rng.random((80, 2))) / 2 < 0.4472).astype(float)
        found = _paired(before, after).layers()[1]
        covered += found.low <= -0.2 <= found.high
    assert covered / 150 > 0.89


def test_an_open_scale_is_never_binary() -> None:
    ones = np.ones((4, 1))
    found = _paired(ones, ones * 0, bounds=None).layers()[1]
    assert (found.test, found.gained, found.low, found.high) == ("bootstrap", None, -1.0, -1.0)
