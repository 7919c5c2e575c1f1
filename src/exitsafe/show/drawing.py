"""Drawings: numbers in, SVG or PNG out. Altair describes them, vl-convert draws them.

Names are data here, never fields or expressions of Vega: a category cannot become part of a formula. Only the SVG
elements and attributes listed below are kept, so no script, link, style or event handler gets through. Colours stay in
attributes, where the page's style sheet replaces them in dark mode (`[fill="#1a1a1a"]`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from exitsafe.results.numbers import fixed

if TYPE_CHECKING:
    import altair as alt

    Drawing = alt.LayerChart | alt.FacetChart | alt.VConcatChart

INK, MUTED, GRID, PAPER = "#1a1a1a", "#5f6368", "#e3e5e8", "#ffffff"
_INK_ON_PALE, _INK_ON_DARK = "#1a1a1b", "#fefefe"
"""INK and PAPER to the eye, but values of their own, by which the style sheet tells them apart."""
_MAX_TICKS = 12
_X_TITLE = "exit layer (encoder blocks executed)"


# ---- how runs differ ----


@dataclass(frozen=True, kw_only=True)
class Look:
    """One run's line.

    Args:
        color: One of Okabe and Ito's, which colour-blind readers can tell apart.
        dash: Lengths of strokes and gaps; none for a solid line.
        marker: Vega's name of a shape.
        path: The same shape for the page's legend.
        is_hollow: Drawn as an outline, so that a line underneath still shows.
    """

    color: str
    dash: tuple[float, ...]
    marker: str
    path: str
    is_hollow: bool = True


LOOKS = (
    Look(color="#D55E00", dash=(5, 2), marker="circle", path="M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z"),
    Look(color="#0072B2", dash=(), marker="square", path="M-3.2,-3.2h6.4v6.4h-6.4Z", is_hollow=False),
    Look(color="#009E73", dash=(3, 1.5), marker="triangle-down", path="M-4.4,-3.4h8.8L0,4.4Z"),
    Look(color="#CC79A7", dash=(1.3, 1.6), marker="diamond", path="M0,-4.8L4,0L0,4.8L-4,0Z"),
    Look(
        color="#000000",
        dash=(1, 3),
        marker="cross",
        path="M-4.4,-1.6h2.8v-2.8h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8Z",
    ),
    Look(color="#E69F00", dash=(6, 2, 1.2, 2), marker="triangle-up", path="M-4.4,3.4h8.8L0,-4.4Z"),
    Look(color="#56B4E9", dash=(8, 2), marker="triangle-right", path="M-3.4,-4.4v8.8L4.4,0Z"),
)
"""In the order of the runs; the two that are faint on white come last."""

STEPS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8)
"""Lower ends of the heat map's steps; the last ends at 1."""
STEP_COLORS = ("#f4f4f5", "#fde3cf", "#f9bf95", "#ee9559", "#d55e00", "#8f3d00")
"""Each differs from its neighbours in lightness; the last two need pale ink."""


# ---- charts ----


@dataclass(frozen=True, kw_only=True)
class Point:
    """A metric at an exit layer, with the ends of its interval."""

    exit_layer: int
    value: float
    low: float
    high: float


Line = tuple[Look, Sequence[Point]]
"""One run's points, by exit layer."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A rate at an exit layer in a category; None where nothing could be scored."""

    exit_layer: int
    row: str
    value: float | None


def line_chart(
    lines: Sequence[Line],
    *,
    exit_layers: Sequence[int],
    default_exit: int,
    is_rate: bool = True,
    from_zero: bool = True,
    size: tuple[int, int],
) -> Drawing:
    """Lines by exit layer with their bands; the default exit is marked.

    Args:
        lines: Those first that lie below the others.
        exit_layers: All layers of all lines, ascending.
        default_exit: Marked if it is one of them.
        is_rate: From 0 to 100%; otherwise the data choose the scale.
        from_zero: Whether a scale that the data choose starts at 0.
        size: Width and height of the plot.
    """
    import altair as alt

    x = _layer_axis(exit_layers, default_exit)
    low, y = (_value_axis(field, is_rate=is_rate, from_zero=from_zero) for field in ("low", "value"))
    layers: list[alt.Chart] = []
    if default_exit in exit_layers:
        rule = _chart([{"exit_layer": default_exit}]).mark_rule(color=MUTED, strokeDash=[2, 2], strokeWidth=1)
        layers.append(rule.encode(x=x))
    curves = []
    for look, points in lines:
        base = _chart(map(vars, points)).encode(x=x)
        layers.append(base.mark_area(color=look.color, opacity=0.14).encode(y=low, y2="high:Q"))
        curves += [_stroke(base, look).encode(y=y), _markers(base, look).encode(y=y)]
    return alt.layer(*layers, *curves).properties(width=size[0], height=size[1])


def figure_of(
    panels: Sequence[tuple[str, str, Drawing]], labels: Sequence[str], *, title: str, notes: Sequence[str]
) -> Drawing:
    """Several line charts side by side under one title, with a legend.

    Args:
        panels: Heading, note and chart of each.
        labels: Of the runs, in the order of their looks.
        title, notes: Above the figure.
    """
    import altair as alt

    headed = [
        chart.properties(title=alt.TitleParams(heading, subtitle=note, anchor="start", offset=10))
        for heading, note, chart in panels
    ]
    top = alt.TitleParams(title, subtitle=list(notes), anchor="start", fontSize=16, offset=14)
    return alt.vconcat(_legend(labels), alt.hconcat(*headed, spacing=28), spacing=16, title=top)


def heat_chart(cells: Sequence[Cell], *, rows: Sequence[str], exit_layers: Sequence[int]) -> Drawing:
    """A rate per row and exit layer as a coloured cell with its percentage; a dash where nothing was scored."""
    import altair as alt

    steps = [None if cell.value is None else step_of(cell.value) for cell in cells]
    data = [
        {
            "layer": str(cell.exit_layer),
            "row": cell.row,
            "text": "-" if cell.value is None else _in_cell(cell.value),
            "fill": GRID if step is None else STEP_COLORS[step],
            "ink": _INK_ON_DARK if step is not None and step >= 4 else _INK_ON_PALE,
        }
        for cell, step in zip(cells, steps, strict=True)
    ]
    base = _chart(data).encode(
        x=alt.X("layer:O").axis(title=_X_TITLE, labelAngle=0).sort([str(layer) for layer in exit_layers]),
        y=alt.Y("row:O").axis(title=None, labelLimit=220, labelFontSize=12).sort(list(rows)),
    )
    squares = base.mark_rect(stroke=PAPER, strokeWidth=2).encode(fill=alt.Fill("fill:N").scale(None).legend(None))
    texts = base.mark_text(fontSize=11).encode(text="text:N", fill=alt.Fill("ink:N").scale(None).legend(None))
    return alt.layer(squares, texts).properties(width=alt.Step(36), height=alt.Step(26))


def step_of(value: float) -> int:
    """The heat map's step of a rate.

    >>> step_of(0.0), step_of(0.2), step_of(1.0)
    (0, 2, 5)
    """
    return max(number for number, low in enumerate(STEPS) if value >= low)


def ticks(exit_layers: Sequence[int], default_exit: int) -> list[int]:
    """The layers to name: all of a few; of many, some and the default exit, clear of its neighbours.

    >>> ticks(range(1, 25), 23), ticks(range(1, 25), 9), ticks(range(1, 5), 4)
    ([1, 5, 9, 13, 17, 23], [1, 5, 9, 13, 17, 21], [1, 2, 3, 4])
    """
    if len(exit_layers) <= _MAX_TICKS:
        return list(exit_layers)
    chosen = list(exit_layers[:: -(-len(exit_layers) // (_MAX_TICKS // 2))])
    if default_exit in exit_layers and default_exit not in chosen:
        room = 1.3 * (exit_layers[-1] - exit_layers[0]) / _MAX_TICKS  # the word under it is three numbers wide
        chosen = sorted([*(layer for layer in chosen if abs(layer - default_exit) > room), default_exit])
    return chosen


# ---- parts of charts ----


def _chart(rows: Iterable[Mapping[str, object]]) -> alt.Chart:
    import altair as alt

    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))


def _stroke(base: alt.Chart, look: Look) -> alt.Chart:
    line: alt.Chart = base.mark_line(color=look.color, strokeDash=list(look.dash), strokeWidth=1.8)
    return line


def _markers(base: alt.Chart, look: Look) -> alt.Chart:
    points: alt.Chart = base.mark_point(
        shape=look.marker,
        filled=True,
        fill=PAPER if look.is_hollow else look.color,
        stroke=look.color,
        strokeWidth=1.5,
        opacity=1,
        size=48 if look.is_hollow else 26,
    )
    return points


def _legend(labels: Sequence[str], *, columns: int = 4, width: int = 220) -> Drawing:
    """Every run's line and label, row by row."""
    import altair as alt

    columns = min(columns, len(labels))
    rows = -(-len(labels) // columns)
    x = alt.X("x:Q").axis(None).scale(domain=[0, columns * width], nice=False)
    y = alt.Y("y:Q").axis(None).scale(domain=[-rows, 0], nice=False)
    layers = []
    for place, (label, look) in enumerate(zip(labels, LOOKS, strict=False)):
        left, middle = place % columns * width, -(place // columns) - 0.5
        line, marker, text = (
            _chart({"x": left + at, "y": middle, "text": label} for at in ats).encode(x=x, y=y)
            for ats in ((0, 40), (20,), (48,))
        )
        layers += [_stroke(line, look), _markers(marker, look)]
        layers.append(
            text.mark_text(align="left", baseline="middle", fontSize=12, color=INK, limit=width - 56).encode(
                text="text:N"
            )
        )
    return alt.layer(*layers).properties(width=columns * width, height=20 * rows, view=alt.ViewConfig(stroke=None))


def _layer_axis(exit_layers: Sequence[int], default_exit: int) -> alt.X:
    import altair as alt

    named = ticks(exit_layers, default_exit)
    domain = [exit_layers[0] - 0.5, exit_layers[-1] + 0.5]
    # only our own numbers stand in this expression
    label = f"datum.value == {int(default_exit)} ? [datum.label, 'default'] : datum.label"
    axis = alt.Axis(title=_X_TITLE, values=named, format="d", grid=False, labelExpr=label, labelOverlap=False)
    return alt.X("exit_layer:Q").axis(axis).scale(domain=domain, nice=False)


def _value_axis(field: str, *, is_rate: bool, from_zero: bool) -> alt.Y:
    import altair as alt

    y = alt.Y(f"{field}:Q")
    if is_rate:
        axis = alt.Axis(title=None, format="%", values=[0, 0.25, 0.5, 0.75, 1])
        return y.axis(axis).scale(domain=[0, 1], nice=False)
    return y.axis(title=None, tickCount=5).scale(zero=from_zero)


def _in_cell(value: float) -> str:
    """Whole percent, to save space; a rate that only rounds to 0 or 100 is marked as such.

    >>> _in_cell(0.004), _in_cell(0.125), _in_cell(0.999), _in_cell(1.0)
    ('<1', '13', '>99', '100')
    """
    if 0 < value < 0.005:
        return "<1"
    return ">99" if 0.995 <= value < 1 else fixed(100 * value, 0)


# ---- drawing ----

_SVG = "http://www.w3.org/2000/svg"
_FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
_TAGS = {"svg", "g", "path", "line", "rect", "circle", "text", "tspan"}
_ATTRIBUTES = {
    "d", "transform", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "dx", "dy", "width", "height", "viewBox",
    "fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "stroke-linecap",
    "stroke-linejoin", "stroke-miterlimit", "opacity", "font-size", "font-weight", "text-anchor",
}  # fmt: skip
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def to_svg(chart: Drawing, *, name: str, title: str, description: str, is_file: bool = False) -> str:
    """Draw a chart as SVG that can be put into a page or a file.

    Args:
        chart: An Altair chart.
        name: An id that nothing else on the page has; letters, digits and hyphens.
        title: What it is, for those who cannot see it.
        description: What it shows, for them.
        is_file: On white and with a font of its own; otherwise the page has both.
    """
    import vl_convert

    assert re.fullmatch(r"[a-z][a-z0-9-]*", name), f"{name!r} is not an id"
    drawn = vl_convert.vegalite_to_svg(json.dumps(_dressed(chart, PAPER if is_file else "transparent")))
    root = _kept(ElementTree.fromstring(drawn))  # noqa: S314  # vl-convert's own output: no entities, no DTD
    assert root is not None
    found = {"xmlns": _SVG, "class": "chart", "role": "img", "aria-labelledby": f"{name}-title {name}-description"}
    root.attrib |= found | ({"font-family": _FONT} if is_file else {})
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = text
        root.insert(position, element)
    # serialised as XML: every text and attribute is escaped
    return ElementTree.tostring(root, encoding="unicode")


def to_png(chart: Drawing) -> bytes:
    """Draw a chart as an image, on white."""
    import vl_convert

    drawn: bytes = vl_convert.vegalite_to_png(json.dumps(_dressed(chart, PAPER)), scale=2)
    return drawn


def _dressed(chart: Drawing, background: str) -> dict[str, object]:
    """The chart's specification with what all charts share."""
    axis = {
        "domainColor": MUTED, "tickColor": MUTED, "gridColor": GRID, "labelColor": INK, "titleColor": INK,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    }  # fmt: skip
    title = {"color": INK, "subtitleColor": MUTED, "fontSize": 13, "subtitleFontSize": 12}
    # Altair's configure methods would copy the whole chart, data included, each time; vl-convert refuses what is wrong
    specification: dict[str, Any] = chart.to_dict(validate=False)
    specification["config"] = {
        "background": background, "font": _FONT, "view": specification["config"]["view"] | {"stroke": None},
        "axis": axis, "axisY": {"domain": False, "ticks": False, "titleAlign": "center"}, "title": title,
    }  # fmt: skip
    return specification


def _kept(element: ElementTree.Element) -> ElementTree.Element | None:
    """The element with its children, cut down to what is known; None if it is not."""
    tag = element.tag.removeprefix(f"{{{_SVG}}}")
    # Vega writes a path without colours behind every group
    is_empty = tag == "path" and element.get("class") in ("background", "foreground") and not element.get("fill")
    if tag not in _TAGS or element.get("display") == "none" or is_empty:
        return None
    attributes = {name: _rounded(value) for name, value in element.attrib.items() if name in _ATTRIBUTES}
    found = ElementTree.Element(tag, attributes)
    found.text = element.text if tag in ("text", "tspan") else None
    children = [kept for child in element if (kept := _kept(child)) is not None]
    found.extend(children)
    # Vega nests groups that contain nothing
    return None if tag == "g" and not children else found


def _rounded(value: str) -> str:
    return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
