"""Exit layers as users write them -> numbers. Does not import torch: commands that only read runs use it too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import index

from exitsafe.errors import ExitLayerError, InputError

ExitLayers = str | int | Sequence[int]
"""Exit layers as users write them: "all", "default", a layer, several, or text such as "1-8,16"."""


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Raise `ExitLayerError` unless 1 <= exit_layer <= num_layers."""
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or not 1 <= exit_layer <= num_layers:
        raise ExitLayerError(
            f"exit_layer={exit_layer}, but this encoder has {num_layers} blocks: choose 1 to {num_layers}"
        )


AS_SERVED = 0
"""The exit of a served model that is not claimed to run any; also its unknown depth and default exit."""


def as_served_or_claimed(exit_layers: ExitLayers) -> tuple[int]:
    """The one exit of a served model: `AS_SERVED`, or the one that it is claimed to run.

    >>> as_served_or_claimed("default"), as_served_or_claimed(9)
    ((0,), (9,))

    Raises:
        InputError: If several are given.
    """
    if exit_layers in ("all", "default"):
        return (AS_SERVED,)
    layers = _parse_layers(exit_layers) if isinstance(exit_layers, str) else exit_layers
    layers = {index(layer) for layer in ([layers] if isinstance(layers, int) else layers)}
    if len(layers) != 1 or not 0 <= max(layers) <= 1000:
        raise InputError("a served model runs one exit: give the one that it is claimed to run, or none")
    return (layers.pop(),)


def resolve_layers(exit_layers: ExitLayers, *, num_layers: int, default_exit: int) -> tuple[int, ...]:
    """Exit layers as users write them -> distinct layers, ascending.

    Args:
        exit_layers: "all", "default", a layer, several, or text with commas and ranges.
        num_layers: Encoder blocks.
        default_exit: What "default" means.

    Raises:
        ExitLayerError: If the encoder has no such block.
        InputError: If the text cannot be parsed or names no layer.

    >>> resolve_layers("1-3,8", num_layers=8, default_exit=7)
    (1, 2, 3, 8)
    """
    if exit_layers == "all":
        return tuple(range(1, num_layers + 1))
    if exit_layers == "default":
        return (default_exit,)
    if isinstance(exit_layers, str):
        layers = _parse_layers(exit_layers)
    else:
        layers = {index(layer) for layer in ([exit_layers] if isinstance(exit_layers, int) else exit_layers)}
    if not layers:
        raise InputError('no exit layer is given; choose "all", "default" or layers such as "1-8,16"')
    for layer in sorted(layers):
        check_exit_layer(layer, num_layers)
    return tuple(sorted(layers))


def _parse_layers(text: str) -> set[int]:
    layers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise InputError(f'exit layers {text!r}: {part!r} is not a layer or a range; write for example "1-8,16"')
        layers.update(range(first, last + 1))
    return layers
