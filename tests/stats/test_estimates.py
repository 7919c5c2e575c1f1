from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exitsafe.stats import bin_estimates, layer_estimates, wilson_interval

NAN = np.nan
# six layers: early 1 2, middle 3 4, late 5 6
SCORES = np.array(
    [
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0, 0.0, NAN],
        [1.0, 0.0, NAN, 0.0, 0.0, 0.0],
    ]
)
UNSCORED = np.isnan(SCORES)
LAYERS = (1, 2, 3, 4, 5, 6)


def test_layers_by_hand() -> None:
    found = layer_estimates(SCORES, UNSCORED, exit_layers=LAYERS, bounds=(0, 1))
    assert [found[layer].value for layer in LAYERS] == pytest.approx([1, 0.5, 2 / 3, 0, 0, 0])
    assert [found[layer].n for layer in LAYERS] == [4, 4, 3, 4, 4, 3]
    assert [found[layer].unscored for layer in LAYERS] == [0, 0, 1, 0, 0, 1]
    assert (found[3].low, found[3].high) == wilson_interval(2, 3)


def test_bins_are_means_of_layer_means_and_average_is_the_mean_of_bins() -> None:
    found = bin_estimates(SCORES, UNSCORED, exit_layers=LAYERS, num_layers=6, bounds=(0, 1))
    assert found["early"].value == pytest.approx(0.75)
    assert found["middle"].value == pytest.approx((2 / 3 + 0) / 2)  # not 2 of 7 pooled
    assert found["late"].value == 0
    assert found["average"].value == pytest.approx((0.75 + 1 / 3 + 0) / 3)
    assert [(found[name].n, found[name].unscored) for name in found] == [(8, 0), (7, 1), (7, 1), (22, 2)]


def test_a_bin_where_nothing_varies_keeps_wilsons_doubt() -> None:
    late = bin_estimates(SCORES, UNSCORED, exit_layers=LAYERS, num_layers=6, bounds=(0, 1))["late"]
    assert (late.low, late.high) == (0.0, wilson_interval(0, 4)[1])


def test_average_is_over_the_bins_that_were_audited() -> None:
    found = bin_estimates(SCORES[:, [0, 4]], UNSCORED[:, [0, 4]], exit_layers=(1, 5), num_layers=6, bounds=(0, 1))
    assert list(found) == ["early", "late", "average"]
    assert found["average"].value == pytest.approx(0.5)


def test_nothing_to_measure_is_left_out_but_nothing_scored_is_told() -> None:
    empty = np.full((2, 2), NAN)
    nothing = layer_estimates(empty, np.zeros((2, 2), bool), exit_layers=(1, 2), bounds=(0, 1))
    assert nothing == {}
    unscored = np.array([[True, False], [True, False]])
    assert list(layer_estimates(empty, unscored, exit_layers=(1, 2), bounds=(0, 1))) == [1]
    for bounds in ((0.0, 1.0), None):
        layer = layer_estimates(empty, unscored, exit_layers=(1, 2), bounds=bounds)[1]
        bins = bin_estimates(empty, unscored, exit_layers=(1, 2), num_layers=2, bounds=bounds)
        for estimate in (layer, bins["middle"], bins["average"]):
            assert (estimate.value, estimate.low, estimate.n, estimate.unscored) == (None, None, 0, 2)


def test_scores_in_between_get_a_bootstrap_interval() -> None:
    scores = np.array([[0.0], [0.3], [0.6], [0.9], [1.0]] * 20)
    found = layer_estimates(scores, np.isnan(scores), exit_layers=(1,), bounds=(0, 1))[1]
    deviation = scores.std() / 10
    assert found.value == pytest.approx(0.56)
    assert found.low == pytest.approx(0.56 - 1.96 * deviation, abs=0.015)
    assert found.high == pytest.approx(0.56 + 1.96 * deviation, abs=0.015)


def test_an_open_scale_of_zeros_and_ones_is_a_mean_not_a_rate() -> None:
    scores = np.ones((5, 1))
    found = layer_estimates(scores, np.isnan(scores), exit_layers=(1,), bounds=None)[1]
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (6, 3), elements=st.sampled_from([0.0, 0.3, 1.0, NAN])))
def test_intervals_hold_their_value_and_nothing_is_lost(scores: np.ndarray) -> None:
    unscored = np.isnan(scores)
    layers = layer_estimates(scores, unscored, exit_layers=(1, 2, 3), bounds=(0, 1))
    bins = bin_estimates(scores, unscored, exit_layers=(1, 2, 3), num_layers=3, bounds=(0, 1))
    for estimate in (*layers.values(), *bins.values()):
        if estimate.n == 0:
            assert estimate.value is None
        else:
            assert estimate.low is not None and estimate.value is not None and estimate.high is not None
            assert 0 <= estimate.low <= estimate.value + 1e-12
            assert estimate.value <= estimate.high + 1e-12 <= 1 + 1e-9
    assert all(estimate.n + estimate.unscored == 6 for estimate in layers.values())
    assert bins["average"].n + bins["average"].unscored == scores.size
