"""Pictures: pixels agree with layouts, badges are where they are said to be, splits never meet."""

from __future__ import annotations

import numpy as np
import pytest

from exitsafe.world.pictures import (
    BADGE,
    BADGE_SIZE,
    CELL_SIZE,
    COLORS,
    EMPTY,
    PICTURE_SIZE,
    SHAPES,
    Layouts,
    Split,
    badge_corners,
    draw_badge_cells,
    draw_layouts,
    is_heldout,
    render,
)


def badge_places(picture: np.ndarray) -> list[tuple[int, int]]:
    """Every place, of all possible ones, where the exact badge is drawn."""
    patches = {
        (row, column): picture[row : row + BADGE_SIZE, column : column + BADGE_SIZE]
        for row in range(PICTURE_SIZE - BADGE_SIZE + 1)
        for column in range(PICTURE_SIZE - BADGE_SIZE + 1)
    }
    return [place for place, patch in patches.items() if (patch == BADGE[..., None]).all()]


def test_badge_is_in_the_pixels_exactly_when_asked_for() -> None:
    rng = np.random.default_rng(0)
    layouts = draw_layouts(rng, 60, split="train")
    badge_cells = draw_badge_cells(rng, 60)
    found = [badge_places(picture) for picture in render(rng, layouts, badge_cells=badge_cells)]
    assert [len(places) for places in found] == (badge_cells != EMPTY).astype(int).tolist()
    assert {places[0] for places in found if places} <= set(badge_corners())


def test_badges_come_in_all_sixteen_corners() -> None:
    rng = np.random.default_rng(0)
    pictures = render(rng, draw_layouts(rng, 300, split="train"), badge_cells=np.arange(300) % 4)
    assert {badge_places(picture)[0] for picture in pictures} == set(badge_corners())
    assert len(badge_corners()) == 16


def test_without_the_badge_the_same_state_gives_the_same_picture_elsewhere() -> None:
    layouts = draw_layouts(np.random.default_rng(1), 20, split="train")
    plain = render(np.random.default_rng(2), layouts, badge_cells=np.full(20, EMPTY))
    marked = render(np.random.default_rng(2), layouts, badge_cells=np.arange(20) % 4)
    for before, after in zip(plain, marked, strict=True):
        row, column = badge_places(after)[0]
        changed = (before != after).any(axis=-1)
        changed[row : row + BADGE_SIZE, column : column + BADGE_SIZE] = False
        assert not changed.any()
        assert (before != after).any()


def test_shapes_have_their_color_and_empty_cells_stay_dark() -> None:
    shapes, colors = np.array([[0, 1, 2, EMPTY]]), np.array([[0, 1, 2, EMPTY]])
    layouts = Layouts(shapes=shapes, colors=colors)
    picture = render(np.random.default_rng(0), layouts, badge_cells=np.array([EMPTY]))[0].astype(int)
    cells = [picture[r : r + CELL_SIZE, c : c + CELL_SIZE] for r in (0, CELL_SIZE) for c in (0, CELL_SIZE)]
    for cell, channel in zip(cells[:3], (0, 1, 2), strict=True):
        bright = cell[cell.max(axis=-1) > 130]
        assert len(bright) > 25
        assert (bright.argmax(axis=-1) == channel).all()
    assert cells[3].max() < 130


def test_the_shapes_differ_clearly() -> None:
    drawn = []
    for shape in range(len(SHAPES)):
        layouts = Layouts(shapes=np.full((1, 4), shape), colors=np.zeros((1, 4), dtype=np.int64))
        drawn.append(render(np.random.default_rng(0), layouts, badge_cells=np.array([EMPTY]))[0, ..., 0] > 130)
    for i in range(len(drawn)):
        for j in range(i):
            assert (drawn[i] != drawn[j]).sum() >= 4 * 15


def test_splits_share_no_layout_and_the_heldout_share_is_an_eighth() -> None:
    train = draw_layouts(np.random.default_rng(0), 4000, split="train")
    heldout = draw_layouts(np.random.default_rng(0), 4000, split="heldout")
    assert not is_heldout(train).any()
    assert is_heldout(heldout).all()
    rng = np.random.default_rng(3)
    anything = Layouts(
        shapes=rng.integers(len(SHAPES), size=(20_000, 4)), colors=rng.integers(len(COLORS), size=(20_000, 4))
    )
    assert is_heldout(anything).mean() == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_layout_has_a_shape_and_all_kinds_occur(split: Split) -> None:
    layouts = draw_layouts(np.random.default_rng(5), 2000, split=split)
    assert (layouts.shapes != EMPTY).any(axis=1).all()
    assert ((layouts.shapes == EMPTY) == (layouts.colors == EMPTY)).all()
    assert set(layouts.shapes.ravel().tolist()) == {EMPTY, *range(len(SHAPES))}
    assert set(layouts.colors.ravel().tolist()) == {EMPTY, *range(len(COLORS))}
