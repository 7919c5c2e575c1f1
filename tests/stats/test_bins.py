from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exitsafe.stats import BINS, bin_of, layers_by_bin


def test_24_blocks_fall_into_three_eights() -> None:
    names = [bin_of(layer, 24) for layer in range(1, 25)]
    assert names == ["early"] * 8 + ["middle"] * 8 + ["late"] * 8


def test_8_blocks_are_cut_by_the_ceiling() -> None:
    # 3 * 2 / 8 = 0.75 -> 1, 3 * 3 / 8 = 1.125 -> 2, 3 * 5 / 8 = 1.875 -> 2, 3 * 6 / 8 = 2.25 -> 3
    assert layers_by_bin(range(1, 9), 8) == {"early": [1, 2], "middle": [3, 4, 5], "late": [6, 7, 8]}


def test_an_encoder_of_one_block_has_only_a_late_exit() -> None:
    assert layers_by_bin([1], 1) == {"late": [1]}
    assert layers_by_bin([1, 2], 2) == {"middle": [1], "late": [2]}


def test_a_bin_without_audited_layers_is_left_out() -> None:
    assert layers_by_bin([23], 24) == {"late": [23]}


@given(st.integers(1, 200))
def test_every_layer_has_a_bin_and_depth_orders_them(num_layers: int) -> None:
    places = [BINS.index(bin_of(layer, num_layers)) for layer in range(1, num_layers + 1)]
    assert places == sorted(places)
    assert places[-1] == 2
    sizes = [places.count(place) for place in range(3)]
    assert max(sizes) - min(sizes) <= 1
