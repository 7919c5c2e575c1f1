"""How the lines of several runs differ: colour, dash and marker, and the ink around them. Tables only."""

from __future__ import annotations

from dataclasses import dataclass

INK, MUTED, GRID, PAPER = "#1a1a1a", "#5f6368", "#e3e5e8", "#ffffff"
INK_ON_PALE_STEP, INK_ON_DARK_STEP = "#1a1a1b", "#fefefe"
"""As INK and PAPER for the eye; values of their own, since the style sheet tells them apart by them."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One run's line.

    Args:
        color: Of Okabe and Ito's, which colour-blind readers can tell apart.
        dash: Lengths of strokes and gaps; none for a solid line.
        marker: Vega's name of a shape.
        is_hollow: Drawn as an outline, so that a line which lies under another still shows.
    """

    color: str
    dash: tuple[float, ...]
    marker: str
    is_hollow: bool = True


LOOKS = (
    Look(color="#D55E00", dash=(5, 2), marker="circle"),
    Look(color="#0072B2", dash=(), marker="square", is_hollow=False),
    Look(color="#009E73", dash=(3, 1.5), marker="triangle-down"),
    Look(color="#CC79A7", dash=(1.3, 1.6), marker="diamond"),
    Look(color="#000000", dash=(1, 3), marker="cross"),
    Look(color="#E69F00", dash=(6, 2, 1.2, 2), marker="triangle-up"),
    Look(color="#56B4E9", dash=(8, 2), marker="triangle-right"),
)
"""In the order of the runs. The two that are faint on white come last."""

MARKER_PATHS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M-3.2,-3.2h6.4v6.4h-6.4Z",
    "triangle-down": "M-4.4,-3.4h8.8L0,4.4Z",
    "triangle-up": "M-4.4,3.4h8.8L0,-4.4Z",
    "triangle-right": "M-3.4,-4.4v8.8L4.4,0Z",
    "diamond": "M0,-4.8L4,0L0,4.8L-4,0Z",
    "cross": "M-4.4,-1.6h2.8v-2.8h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8Z",
}
"""The markers once more, for the legend."""

STEPS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8)
"""Lower ends of the heat map's steps; the last ends at 1."""
STEP_COLORS = ("#f4f4f5", "#fde3cf", "#f9bf95", "#ee9559", "#d55e00", "#8f3d00")
"""From pale to Okabe and Ito's vermilion and darker; each differs from its neighbours in lightness."""
IS_DARK_STEP = (False, False, False, False, True, True)


def step_of(value: float) -> int:
    """The heat map's step of a rate.

    >>> step_of(0.0), step_of(0.2), step_of(1.0)
    (0, 2, 5)
    """
    return max(number for number, low in enumerate(STEPS) if value >= low)
