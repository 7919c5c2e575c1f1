"""The world's pictures: random generator in, layouts and pixels out.

A picture has 2 x 2 cells of 16 pixels on a dark, noisy background. A cell is empty or contains one coloured shape, with
slight jitter of position and colour. A hazard badge of 5 x 5 pixels may be in one corner of one cell.

The layout (which shape of which colour in which cell) decides the split: a fixed eighth of all layouts is held out, so
no held-out picture has a layout that occurs in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "heldout"]

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
NUM_CELLS = 4
CELL_SIZE = 16
PICTURE_SIZE = 32
BADGE_SIZE = 5
EMPTY = -1

_PALETTE = np.array(
    [[220, 40, 40], [40, 190, 60], [50, 80, 230], [225, 210, 40], [185, 50, 200], [40, 200, 210]], dtype=np.int16
)
_GROUND_MAX = 56
_SHAPE_JITTER = 1
_EMPTY_SHARE = 0.25
_HELDOUT_ONE_IN = 8


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """The contents of N pictures: `shapes` and `colors` are (N, 4) in reading order, EMPTY for an empty cell."""

    shapes: NDArray[np.int64]
    colors: NDArray[np.int64]


def draw_layouts(rng: np.random.Generator, num_pictures: int, *, split: Split) -> Layouts:
    """Random layouts of one split, each with at least one shape."""
    shapes = np.empty((num_pictures, NUM_CELLS), dtype=np.int64)
    colors = np.empty((num_pictures, NUM_CELLS), dtype=np.int64)
    missing = np.arange(num_pictures)
    while missing.size:
        size = (missing.size, NUM_CELLS)
        is_empty = rng.random(size) < _EMPTY_SHARE
        shapes[missing] = np.where(is_empty, EMPTY, rng.integers(len(SHAPES), size=size))
        colors[missing] = np.where(is_empty, EMPTY, rng.integers(len(COLORS), size=size))
        drawn = Layouts(shapes=shapes[missing], colors=colors[missing])
        is_wanted = is_heldout(drawn) == (split == "heldout")
        has_shape = (drawn.shapes != EMPTY).any(axis=1)
        missing = missing[~(is_wanted & has_shape)]
    return Layouts(shapes=shapes, colors=colors)


def is_heldout(layouts: Layouts) -> NDArray[np.bool_]:
    """Whether each layout belongs to the held-out eighth (a fixed hash of the layout, the same for every seed)."""
    cells = np.where(layouts.shapes == EMPTY, 0, 1 + layouts.shapes * len(COLORS) + layouts.colors)
    code = np.zeros(len(cells), dtype=np.uint64)
    for cell in range(NUM_CELLS):
        code = code * np.uint64(len(SHAPES) * len(COLORS) + 1) + cells[:, cell].astype(np.uint64)
    # Knuth's multiplicative hash: similar layouts end up in both splits
    mixed = (code * np.uint64(2654435761)) % np.uint64(2**32) >> np.uint64(13)
    heldout: NDArray[np.bool_] = mixed % np.uint64(_HELDOUT_ONE_IN) == 0
    return heldout


def render(rng: np.random.Generator, layouts: Layouts, *, badge_cells: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pixels (N, 32, 32, 3) of the layouts.

    Args:
        rng: Draws noise, jitter and the badge's corner. The same state with and without a badge gives the same
            picture except for the 25 pixels of the badge.
        layouts: N layouts.
        badge_cells: (N,) the badge's cell, 0 to 3; EMPTY for no badge.
    """
    num_pictures = len(layouts.shapes)
    size = (num_pictures, PICTURE_SIZE, PICTURE_SIZE, 3)
    pixels = rng.integers(0, _GROUND_MAX, size=size, dtype=np.int16)
    grain = rng.integers(-12, 13, size=size, dtype=np.int16)
    shifts = rng.integers(0, 2 * _SHAPE_JITTER + 1, size=(num_pictures, NUM_CELLS, 2))
    tint = rng.integers(-20, 21, size=(num_pictures, NUM_CELLS, 3), dtype=np.int16)
    for cell in range(NUM_CELLS):
        rows, columns = _cell_slices(cell)
        shape = layouts.shapes[:, cell]
        mask = _MASKS[shape, shifts[:, cell, 0], shifts[:, cell, 1]] & (shape != EMPTY)[:, None, None]
        color = (_PALETTE[layouts.colors[:, cell]] + tint[:, cell])[:, None, None, :]
        area = pixels[:, rows, columns]
        pixels[:, rows, columns] = np.where(mask[..., None], color + grain[:, rows, columns], area)
    _draw_badges(pixels, badge_cells, rng.integers(4, size=num_pictures))
    return pixels.clip(0, 255).astype(np.uint8)


def draw_badge_cells(rng: np.random.Generator, num_pictures: int) -> NDArray[np.int64]:
    """A random cell for the badge in half of the pictures, EMPTY in the others."""
    has_badge = rng.random(num_pictures) < 0.5
    return np.where(has_badge, rng.integers(NUM_CELLS, size=num_pictures), EMPTY)


def badge_corners() -> tuple[tuple[int, int], ...]:
    """Top-left pixel (row, column) of the 16 possible positions of a badge."""
    return tuple(_badge_place(cell, corner) for cell in range(NUM_CELLS) for corner in range(4))


def _draw_badges(pixels: NDArray[np.int16], cells: NDArray[np.int64], corners: NDArray[np.int64]) -> None:
    for index in np.flatnonzero(cells != EMPTY):
        row, column = _badge_place(int(cells[index]), int(corners[index]))
        pixels[index, row : row + BADGE_SIZE, column : column + BADGE_SIZE] = BADGE[..., None]


def _badge_place(cell: int, corner: int) -> tuple[int, int]:
    far = CELL_SIZE - BADGE_SIZE
    return (cell // 2) * CELL_SIZE + far * (corner // 2), (cell % 2) * CELL_SIZE + far * (corner % 2)


def _cell_slices(cell: int) -> tuple[slice, slice]:
    top, left = (cell // 2) * CELL_SIZE, (cell % 2) * CELL_SIZE
    return slice(top, top + CELL_SIZE), slice(left, left + CELL_SIZE)


def _badge() -> NDArray[np.int16]:
    """A black diagonal cross on white; no shape is white."""
    row, column = np.indices((BADGE_SIZE, BADGE_SIZE))
    is_black = (row == column) | (row + column == BADGE_SIZE - 1)
    return np.where(is_black, 0, 255).astype(np.int16)


def _shape_masks() -> NDArray[np.bool_]:
    """(shape, row shift, column shift, 16, 16): each shape 10 to 12 pixels wide, at each jitter."""
    shifts = range(-_SHAPE_JITTER, _SHAPE_JITTER + 1)
    masks = np.zeros((len(SHAPES), len(shifts), len(shifts), CELL_SIZE, CELL_SIZE), dtype=bool)
    for i, down in enumerate(shifts):
        for j, right in enumerate(shifts):
            row, column = np.indices((CELL_SIZE, CELL_SIZE))
            y, x = row - 7.5 - down, column - 7.5 - right
            masks[0, i, j] = (x**2 + y**2 <= 6.2**2) & (x**2 + y**2 >= 3.2**2)
            masks[1, i, j] = np.maximum(abs(x), abs(y)) <= 5
            masks[2, i, j] = (abs(y) <= 6) & (abs(x) <= (y + 6) / 2 + 0.3)
            masks[3, i, j] = (np.maximum(abs(x), abs(y)) <= 6) & (np.minimum(abs(x), abs(y)) <= 1.5)
    return masks


BADGE = _badge()
_MASKS = _shape_masks()
