"""Early, middle and late exit layers: a layer and the depth in, a bin's name out."""

from __future__ import annotations

from collections.abc import Iterable

BINS = ("early", "middle", "late")


def bin_of(exit_layer: int, num_layers: int) -> str:
    """The bin of a layer: `ceil(3 * exit_layer / num_layers)`, counted early, middle, late.

    >>> [bin_of(layer, 24) for layer in (1, 8, 9, 16, 17, 24)]
    ['early', 'early', 'middle', 'middle', 'late', 'late']
    """
    assert 1 <= exit_layer <= num_layers, f"there is no exit {exit_layer} in {num_layers} blocks"
    # integers only: a quotient such as 3 * 7 / 7 must not be rounded up because of floating-point error
    return BINS[-(-3 * exit_layer // num_layers) - 1]


def layers_by_bin(exit_layers: Iterable[int], num_layers: int) -> dict[str, list[int]]:
    """The given layers by bin, in bin order, without empty bins; empty if the depth is unknown (0).

    >>> layers_by_bin([1, 2, 7], 8)
    {'early': [1, 2], 'late': [7]}
    """
    if num_layers == 0:
        return {}
    found: dict[str, list[int]] = {name: [] for name in BINS}
    for layer in exit_layers:
        found[bin_of(layer, num_layers)].append(layer)
    return {name: layers for name, layers in found.items() if layers}
