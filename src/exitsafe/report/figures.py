"""The page's charts: numbers in, Altair charts out (`Any`: Altair is an extra). Knows no run and no page.

Names are data here, never fields or expressions of Vega: a category cannot become part of a formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exitsafe.report.looks import (
    GRID,
    INK,
    INK_ON_DARK_STEP,
    INK_ON_PALE_STEP,
    IS_DARK_STEP,
    MUTED,
    PAPER,
    STEP_COLORS,
    Look,
    step_of,
)
from exitsafe.runs.numbers import fixed, number_list

_WIDTH, _HEIGHT = 330, 190
_MAX_TICKS = 12
_X_TITLE = "exit layer (encoder blocks executed)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A metric at an exit layer, with the ends of its interval."""

    exit_layer: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run's points, by exit layer."""

    look: Look
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One run at one exit layer on two metrics."""

    exit_layer: int
    x: Point
    y: Point


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A rate at an exit layer in a category; None where nothing could be scored."""

    exit_layer: int
    row: str
    value: float | None


def line_chart(
    lines: Sequence[Line], *, exit_layers: Sequence[int], default_exit: int, is_rate: bool, from_zero: bool
) -> Any:
    """Lines by exit layer, their bands, and the default exit marked.

    Args:
        lines: One or more, those first that lie below the others.
        exit_layers: All layers of all lines, ascending.
        default_exit: Marked if it is one of them.
        is_rate: From 0 to 100%; else the data choose the scale.
        from_zero: Whether a scale that the data choose starts at 0.
    """
    import altair as alt

    y = _rate_axis(None) if is_rate else alt.Y("value:Q").axis(title=None, tickCount=5).scale(zero=from_zero)
    layers: list[Any] = [_default_rule(default_exit)] if default_exit in exit_layers else []
    for line in lines:
        base = alt.Chart(_data(vars(point) for point in line.points)).encode(x=_layer_axis(exit_layers, default_exit))
        layers.append(base.mark_area(color=line.look.color, opacity=0.14).encode(y=_like(y, "low"), y2="high:Q"))
    for line in lines:
        base = alt.Chart(_data(vars(point) for point in line.points)).encode(x=_layer_axis(exit_layers, default_exit))
        layers.append(
            base.mark_line(color=line.look.color, strokeDash=list(line.look.dash), strokeWidth=1.8).encode(y=y)
        )
        layers.append(_markers(base, line.look).encode(y=y))
    return _dressed(alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT))


def scatter_chart(
    groups: Sequence[tuple[Look, Sequence[Spot]]], *, default_exit: int, x_title: str, y_title: str
) -> Any:
    """One marker per run and exit layer on two rates, with both intervals; markers of the default exit are filled."""
    import altair as alt

    domain = _around([end for _, spots in groups for spot in spots for end in (spot.x.low, spot.x.high)])
    x = alt.X("x:Q").axis(title=x_title, format="%", grid=True, tickCount=5).scale(domain=domain, nice=False)
    layers: list[Any] = []
    for look, spots in groups:
        rows = [
            {"x": s.x.value, "x_low": s.x.low, "x_high": s.x.high, "value": s.y.value, "low": s.y.low, "high": s.y.high}
            for s in spots
        ]
        base = alt.Chart(_data(rows)).mark_rule(color=look.color, opacity=0.35)
        layers.append(base.encode(x=x, y=_rate_axis(y_title, "low"), y2="high:Q"))
        layers.append(base.encode(x=_like(x, "x_low"), x2="x_high:Q", y=_rate_axis(y_title)))
        for is_default in (False, True):
            chosen = [row for row, s in zip(rows, spots, strict=True) if (s.exit_layer == default_exit) == is_default]
            markers = _markers(alt.Chart(_data(chosen)), look, is_hollow=not is_default, size=90 if is_default else 60)
            layers.append(markers.encode(x=x, y=_rate_axis(y_title)))
    for place, (_, spots) in enumerate(groups):
        layers.append(_spot_labels(spots, x=x, y_title=y_title, place=place, default_exit=default_exit))
    return _dressed(alt.layer(*layers).properties(width=460, height=320))


def heat_chart(cells: Sequence[Cell], *, rows: Sequence[str], exit_layers: Sequence[int]) -> Any:
    """A rate per row and exit layer as a coloured cell with its percentage; a dash where nothing was scored."""
    import altair as alt

    data = _data(
        {
            "layer": str(cell.exit_layer),
            "row": cell.row,
            "text": "-" if cell.value is None else _in_cell(cell.value),
            "fill": GRID if cell.value is None else STEP_COLORS[step_of(cell.value)],
            "ink": INK_ON_DARK_STEP
            if cell.value is not None and IS_DARK_STEP[step_of(cell.value)]
            else INK_ON_PALE_STEP,
        }
        for cell in cells
    )
    base = alt.Chart(data).encode(
        x=alt.X("layer:O").axis(title=_X_TITLE, labelAngle=0).sort([str(layer) for layer in exit_layers]),
        y=alt.Y("row:O").axis(title=None, labelLimit=220, labelFontSize=12).sort(list(rows)),
    )
    squares = base.mark_rect(stroke=PAPER, strokeWidth=2).encode(fill=alt.Fill("fill:N").scale(None).legend(None))
    texts = base.mark_text(fontSize=11).encode(text="text:N", fill=alt.Fill("ink:N").scale(None).legend(None))
    return _dressed(alt.layer(squares, texts).properties(width=alt.Step(36), height=alt.Step(26)))


def _in_cell(value: float) -> str:
    """Whole percent, to save space; a rate that only rounds to 0 or 100 is marked as such.

    >>> _in_cell(0.004), _in_cell(0.125), _in_cell(0.999), _in_cell(1.0)
    ('<1', '13', '>99', '100')
    """
    if 0 < value < 0.005:
        return "<1"
    return ">99" if 0.995 <= value < 1 else fixed(100 * value, 0)


def ticks(exit_layers: Sequence[int], default_exit: int) -> list[int]:
    """The layers to name: all of a few; of many, some and the default exit, clear of its neighbours.

    >>> ticks(range(1, 25), 23)
    [1, 5, 9, 13, 17, 23]
    """
    if len(exit_layers) <= _MAX_TICKS:
        return list(exit_layers)
    chosen = list(exit_layers[:: -(-len(exit_layers) // (_MAX_TICKS // 2))])
    if default_exit in exit_layers and default_exit not in chosen:
        room = 1.3 * (exit_layers[-1] - exit_layers[0]) / _MAX_TICKS  # the word under it is three numbers wide
        chosen = sorted([*(layer for layer in chosen if abs(layer - default_exit) > room), default_exit])
    return chosen


def _markers(base: Any, look: Look, *, is_hollow: bool | None = None, size: int | None = None) -> Any:
    hollow = look.is_hollow if is_hollow is None else is_hollow
    return base.mark_point(
        shape=look.marker,
        filled=True,
        fill=PAPER if hollow else look.color,
        stroke=look.color,
        strokeWidth=1.5,
        opacity=1,
        size=size or (48 if hollow else 26),
    )


def _spot_labels(spots: Sequence[Spot], *, x: Any, y_title: str, place: int, default_exit: int) -> Any:
    """The exit layers at a spot; spots that lie on one another share a label. Runs in turn write on another side."""
    import altair as alt

    # of many only the ends and the default are named: others would lie on one another
    named = {spots[0].exit_layer, spots[-1].exit_layer, default_exit} if len(spots) > _MAX_TICKS else None
    together: dict[tuple[int, int], list[Spot]] = {}
    for spot in (spot for spot in spots if named is None or spot.exit_layer in named):
        together.setdefault((round(spot.x.value * 25), round(spot.y.value * 25)), []).append(spot)
    rows = [
        {"x": group[0].x.value, "value": group[0].y.value, "text": number_list(sorted(s.exit_layer for s in group))}
        for group in together.values()
    ]
    is_left = place % 2 == 0
    labels = alt.Chart(_data(rows)).mark_text(
        dx=-9 if is_left else 9,
        dy=-10 if is_left else 12,
        align="right" if is_left else "left",
        baseline="middle",
        fontSize=11,
        color=INK,
    )
    return labels.encode(x=x, y=_rate_axis(y_title), text="text:N")


def _default_rule(default_exit: int) -> Any:
    import altair as alt

    base = alt.Chart(_data([{"exit_layer": default_exit}])).encode(x="exit_layer:Q")
    return base.mark_rule(color=MUTED, strokeDash=[2, 2], strokeWidth=1)


def _layer_axis(exit_layers: Sequence[int], default_exit: int) -> Any:
    import altair as alt

    shown = ticks(exit_layers, default_exit)
    domain = [exit_layers[0] - 0.5, exit_layers[-1] + 0.5]
    # only our own numbers stand in this expression
    label = f"datum.value == {int(default_exit)} ? [datum.label, 'default'] : datum.label"
    axis = alt.Axis(title=_X_TITLE, values=shown, format="d", grid=False, labelExpr=label, labelOverlap=False)
    return alt.X("exit_layer:Q").axis(axis).scale(domain=domain, nice=False)


def _around(values: Sequence[float]) -> list[float]:
    """The tenths around some rates, at least a fifth of the scale.

    >>> _around([0.93, 0.99]), _around([0.0, 0.02])
    ([0.8, 1.0], [0.0, 0.2])
    """
    low, high = math.floor(10 * min(values)), math.ceil(10 * max(values))
    low = max(0, min(low, high - 2, 8))
    return [low / 10, max(high, low + 2) / 10]


def _rate_axis(title: str | None, field: str = "value") -> Any:
    import altair as alt

    axis = alt.Axis(title=title, format="%", values=[0, 0.25, 0.5, 0.75, 1])
    return alt.Y(f"{field}:Q").axis(axis).scale(domain=[0, 1], nice=False)


def _like(channel: Any, field: str) -> Any:
    """The same axis and scale for another field."""
    copy = channel.copy()
    copy.shorthand = f"{field}:Q"
    return copy


def _data(rows: Any) -> Any:
    import altair as alt

    return alt.Data(values=list(rows))


def _dressed(chart: Any) -> Any:
    """What all charts share. The page's own font and colours come from its style sheet."""
    axis = {
        "domainColor": MUTED, "tickColor": MUTED, "gridColor": GRID, "labelColor": INK, "titleColor": INK,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    }  # fmt: skip
    return (
        chart.configure(background="transparent", font="DejaVu Sans, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .configure_axisY(domain=False, ticks=False, titleAlign="center")
        .resolve_scale(x="shared", y="shared")
    )
