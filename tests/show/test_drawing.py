from __future__ import annotations

import re
from xml.etree import ElementTree

import vl_convert
from pytest import MonkeyPatch, raises

from exitsafe.show.drawing import (
    LOOKS,
    STEP_COLORS,
    STEPS,
    Cell,
    Point,
    heat_chart,
    line_chart,
    step_of,
    to_svg,
)

HOSTILE = ["<script>alert(1)</script>", "]]></svg>", "javascript:alert(1)", "datum.x", "signal('a')"]
LAYERS = list(range(1, 25))


def points(value: float) -> list[Point]:
    return [Point(exit_layer=n, value=value, low=value - 0.1, high=value + 0.1) for n in LAYERS]


def texts(svg: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter()
    return [element.text or "" for element in found if element.tag.endswith(("}text", "}tspan"))]


def test_a_drawing_says_what_it_is_and_lines_differ() -> None:
    lines = [(look, points(0.2 + 0.1 * i)) for i, look in enumerate(LOOKS[:2])]
    chart = line_chart(lines, exit_layers=LAYERS, default_exit=23, size=(330, 190))
    svg = to_svg(chart, name="one", title="A <b> & c", description="From 1 to 2.")
    assert 'role="img" aria-labelledby="one-title one-description"' in svg
    assert '<title id="one-title">A &lt;b&gt; &amp; c</title><desc id="one-description">From 1 to 2.</desc>' in svg
    assert {"1", "23", "100%", "exit layer (encoder blocks executed)", "default"} <= set(texts(svg))
    for look in LOOKS[:2]:
        assert f'fill="{look.color}"' in svg or look.is_hollow
        assert f'stroke="{look.color}"' in svg
    assert f'stroke-dasharray="{",".join(map(str, LOOKS[0].dash))}"' in svg
    assert svg.count('opacity="0.14"') == 2
    for attribute in ("color", "dash", "marker", "path"):
        assert len({getattr(look, attribute) for look in LOOKS}) == len(LOOKS)


def test_only_known_shapes_and_attributes_are_kept(monkeypatch: MonkeyPatch) -> None:
    drawn = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" onload="alert(1)" style="color:red">'
        '<script>alert(1)</script><g role="graphics-symbol"><a href="javascript:alert(1)"><text>in a link</text></a>'
        '<image href="http://a"/><text class="x" fill="#000" style="fill:red">kept</text></g><foreignObject/></svg>'
    )
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda specification: drawn)
    chart = line_chart([], exit_layers=LAYERS, default_exit=1, size=(330, 190))
    svg = to_svg(chart, name="one", title="t", description="d")
    assert re.sub("<title.*</desc>", "", svg) == (
        '<svg width="9" xmlns="http://www.w3.org/2000/svg" class="chart" role="img" '
        'aria-labelledby="one-title one-description"><g><text fill="#000">kept</text></g></svg>'
    )
    with raises(AssertionError, match="is not an id"):
        to_svg(chart, name='"><script>', title="t", description="d")


def test_names_are_data_and_never_formulas_or_markup() -> None:
    cells = [Cell(exit_layer=layer, row=row, value=0.5) for row in HOSTILE for layer in (1, 2)]
    svg = to_svg(heat_chart(cells, rows=HOSTILE, exit_layers=[1, 2]), name="one", title="t", description="d")
    assert texts(svg).count("50") == len(cells)
    assert set(HOSTILE) <= set(texts(svg))
    assert "<script" not in svg


def test_a_heat_map_has_steps_and_marks_what_was_not_scored() -> None:
    values = [*STEPS, 1.0, None]
    cells = [Cell(exit_layer=n, row="one", value=value) for n, value in enumerate(values)]
    chart = heat_chart(cells, rows=["one"], exit_layers=range(len(values)))
    svg = to_svg(chart, name="one", title="t", description="d")
    assert texts(svg)[: len(values)] == ["0", "5", "20", "40", "60", "80", "100", "-"]
    assert re.findall(r'<path[^>]*fill="(#\w+)"', svg) == [*STEP_COLORS, STEP_COLORS[-1], "#e3e5e8"]
    assert step_of(0.0499) == 0
