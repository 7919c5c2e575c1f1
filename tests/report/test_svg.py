from __future__ import annotations

import re
from xml.etree import ElementTree

import vl_convert
from pytest import MonkeyPatch, raises

from exitsafe.report.figures import Cell, Line, Point, Spot, heat_chart, line_chart, scatter_chart, ticks
from exitsafe.report.looks import LOOKS, STEP_COLORS, STEPS, step_of
from exitsafe.report.svg import to_svg

HOSTILE = ["<script>alert(1)</script>", "]]></svg>", "javascript:alert(1)", "datum.x", "signal('a')"]
LAYERS = list(range(1, 25))


def points(value: float) -> tuple[Point, ...]:
    return tuple(Point(exit_layer=n, value=value, low=value - 0.1, high=value + 0.1) for n in LAYERS)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def line_svg() -> str:
    lines = [Line(look=look, points=points(0.2 + 0.1 * i)) for i, look in enumerate(LOOKS[:2])]
    chart = line_chart(lines, exit_layers=LAYERS, default_exit=23, is_rate=True, from_zero=True)
    return to_svg(chart, name="one", title="A <b> & c", description="From 1 to 2.")


def test_a_drawing_says_what_it_is_and_its_text_stays_text() -> None:
    svg = line_svg()
    assert 'role="img" aria-labelledby="one-title one-description"' in svg
    assert '<title id="one-title">A &lt;b&gt; &amp; c</title><desc id="one-description">From 1 to 2.</desc>' in svg
    assert {"1", "23", "100%", "exit layer (encoder blocks executed)", "default"} <= {
        part for text in texts(svg) for part in [text]
    } | set(re.findall(r"<tspan[^>]*>([^<]*)</tspan>", svg))


def test_lines_differ_in_colour_dash_and_marker_and_bands_are_drawn() -> None:
    svg = line_svg()
    for look in LOOKS[:2]:
        assert f'fill="{look.color}"' in svg or look.is_hollow
        assert f'stroke="{look.color}"' in svg
    assert f'stroke-dasharray="{",".join(map(str, LOOKS[0].dash))}"' in svg
    assert svg.count('opacity="0.14"') == 2
    for attribute in ("color", "dash", "marker"):
        assert len({getattr(look, attribute) for look in LOOKS}) == len(LOOKS)


def test_only_known_shapes_and_attributes_are_kept(monkeypatch: MonkeyPatch) -> None:
    drawn = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" onload="alert(1)" style="color:red">'
        '<script>alert(1)</script><g role="graphics-symbol"><a href="javascript:alert(1)"><text>in a link</text></a>'
        '<image href="http://a"/><text class="x" fill="#000" style="fill:red">kept</text></g><foreignObject/></svg>'
    )
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda spec: drawn)
    chart = line_chart([], exit_layers=LAYERS, default_exit=1, is_rate=True, from_zero=True)
    svg = to_svg(chart, name="one", title="t", description="d")
    assert re.sub("<title.*</desc>", "", svg) == (
        '<svg width="9" xmlns="http://www.w3.org/2000/svg" class="chart" role="img" '
        'aria-labelledby="one-title one-description"><g><text fill="#000">kept</text></g></svg>'
    )


def test_names_are_data_and_never_formulas_or_markup() -> None:
    cells = [Cell(exit_layer=layer, row=row, value=0.5) for row in HOSTILE for layer in (1, 2)]
    svg = to_svg(heat_chart(cells, rows=HOSTILE, exit_layers=[1, 2]), name="one", title="t", description="d")
    assert texts(svg).count("50") == len(cells)
    assert set(HOSTILE) <= set(texts(svg))
    assert "<script" not in svg


def test_a_heat_map_steps_and_tells_what_was_not_scored() -> None:
    values = [*STEPS, 1.0, None]
    cells = [Cell(exit_layer=n, row="one", value=value) for n, value in enumerate(values)]
    chart = heat_chart(cells, rows=["one"], exit_layers=range(len(values)))
    svg = to_svg(chart, name="one", title="t", description="d")
    assert texts(svg)[: len(values)] == ["0", "5", "20", "40", "60", "80", "100", "-"]
    assert re.findall(r'<path[^>]*fill="(#\w+)"', svg) == [*STEP_COLORS, STEP_COLORS[-1], "#e3e5e8"]
    assert step_of(0.0499) == 0


def test_a_scatter_marks_the_default_and_joins_labels_that_would_lie_on_one_another() -> None:
    same = Point(exit_layer=1, value=0.9, low=0.85, high=0.95)
    spots = [Spot(exit_layer=n, x=same, y=same) for n in (1, 2, 3, 7)]
    chart = scatter_chart([(LOOKS[0], spots)], default_exit=7, x_title="X", y_title="Y")
    svg = to_svg(chart, name="one", title="t", description="d")
    assert "1-3, 7" in texts(svg)
    markers = re.findall(rf'<path[^>]*fill="([^"]+)" stroke="{LOOKS[0].color}" stroke-width="1.5"', svg)
    assert sorted(markers) == sorted(["#ffffff"] * 3 + [LOOKS[0].color])
    many = [Spot(exit_layer=n, x=same, y=Point(exit_layer=n, value=n / 24, low=0, high=1)) for n in LAYERS]
    chart = scatter_chart([(LOOKS[0], many)], default_exit=12, x_title="X", y_title="Y")
    named = texts(to_svg(chart, name="one", title="t", description="d"))
    assert [n for n in ("1", "12", "24", "6") if n in named] == ["1", "12", "24"]


def test_ticks_keep_clear_of_the_default() -> None:
    assert ticks(range(1, 9), 7) == list(range(1, 9))
    assert ticks(range(1, 25), 9) == [1, 5, 9, 13, 17, 21]
    assert ticks(range(1, 33), 32) == [1, 7, 13, 19, 25, 32]


def test_an_id_is_ours() -> None:
    chart = line_chart([], exit_layers=LAYERS, default_exit=1, is_rate=True, from_zero=True)
    with raises(AssertionError, match="is no id"):
        to_svg(chart, name='"><script>', title="t", description="d")
