from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.report import chart, draw_chart
from exitsafe.report.chart import _PANELS, _SVG_TEXT, _make_figure, _points, _ticks
from exitsafe.runs import AuditRun
from exitsafe.stats import wilson_interval

METRICS = {"asr": 128, "over_refusal": 128, "vqa_accuracy": 160}


def _estimate(value: float, n: int) -> dict[str, Any]:
    low, high = wilson_interval(round(value * n), n)
    return {"value": value, "low": low, "high": high, "n": n, "unscored": 0}


def make_run(
    values: list[float], *, default_exit: int = 7, metrics: tuple[str, ...] = tuple(METRICS), model: str = "organism"
) -> AuditRun:
    layers = [
        {"exit_layer": layer, "metrics": {name: _estimate(value, METRICS[name]) for name in metrics}}
        for layer, value in enumerate(values, 1)
    ]
    summary = {"model": model, "num_layers": len(values), "default_exit": default_exit, "layers": layers}
    settings = {"exit_layers": list(range(1, len(values) + 1))}
    return AuditRun(path=Path("run"), settings=settings, origin={}, summary=summary)


BEFORE, AFTER = make_run([1, 1, 1, 1, 1, 0.5, 0.01, 0.01]), make_run([0.03, 0.02, 0.01, 0, 0, 0, 0, 0])
TWO = [("before", BEFORE), ("after L-PPO", AFTER)]
FIVE = [*TWO, ("PPO at the default exit", BEFORE), ("SFT on refusals", AFTER), ("SFT with benign data", AFTER)]
DEEP = [("before", make_run([0.5] * 24, default_exit=23)), ("after", make_run([0.2] * 24, default_exit=23))]


def test_text_stays_text_and_says_what_matters(tmp_path: Path) -> None:
    svg = draw_chart(TWO, tmp_path / "chart.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "organism: safety and utility by exit layer" in texts
    for text in ("before", "after L-PPO", "Attack success", "Over-refusal", "VQA accuracy", "default"):
        assert text in texts
    assert any("128 harmful requests, 128 borderline requests, 160 picture questions" in text for text in texts)
    assert "<title>organism: safety and utility by exit layer</title>" in svg


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for ending in ("svg", "png"):
        first = draw_chart(TWO, tmp_path / f"a.{ending}").read_bytes()
        assert draw_chart(TWO, tmp_path / f"b.{ending}").read_bytes() == first
        assert draw_chart(DEEP, tmp_path / f"c.{ending}").read_bytes() != first


def test_a_png_is_an_image(tmp_path: Path) -> None:
    with Image.open(draw_chart(TWO, tmp_path / "new" / "chart.PNG", title="Mine")) as image:
        assert image.format == "PNG"
        assert image.width > 1600


def test_the_settings_of_others_are_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_chart(TWO, tmp_path / "chart.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("runs", [TWO, FIVE, DEEP], ids=["two", "five", "deep"])
def test_no_text_covers_another_or_leaves_the_figure(runs: Any) -> None:
    with matplotlib.rc_context(_SVG_TEXT):
        figure = _make_figure(runs, _PANELS, title="some-model: safety and utility by exit layer")
        figure.canvas.draw()
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    names = {name for name, _ in boxes}
    assert {"default", "Attack success", runs[0][0], runs[-1][0]} <= names
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name
    for (name, box), (other_name, other) in combinations(boxes, 2):
        assert not box.overlaps(other), (name, other_name)


def test_points_carry_value_and_band() -> None:
    low, high = wilson_interval(64, 128)
    assert _points(BEFORE, "asr")[5] == (6, 0.5, low, high)
    unscored = make_run([0.5])
    unscored.summary["layers"][0]["metrics"]["asr"]["value"] = None
    assert _points(unscored, "asr") == []


def test_lines_differ_in_colour_dash_and_marker() -> None:
    looks = chart._LOOKS[:5]
    assert len({look.color for look in looks}) == len({str(look.dash) for look in looks}) == 5
    assert len({look.marker for look in looks}) == 5


def test_a_metric_that_no_run_has_gets_no_panel(tmp_path: Path) -> None:
    some = [
        ("before", make_run([0.1] * 8, metrics=("asr",))),
        ("after", make_run([0.1] * 8, metrics=("over_refusal",))),
    ]
    svg = draw_chart(some, tmp_path / "chart.svg").read_text()
    assert "Over-refusal" in svg
    assert "VQA accuracy" not in svg
    assert svg.count(">before<") == svg.count(">after<") == 1


@pytest.mark.parametrize(
    ("layers", "default_exit", "expected"),
    [
        (list(range(1, 9)), 7, list(range(1, 9))),
        (list(range(1, 25)), 23, [1, 5, 9, 13, 17, 23]),
        (list(range(1, 33)), 32, [1, 7, 13, 19, 25, 32]),
        (list(range(1, 25)), 9, [1, 5, 9, 13, 17, 21]),
    ],
)
def test_ticks(layers: list[int], default_exit: int, expected: list[int]) -> None:
    assert _ticks(layers, default_exit) == expected


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        draw_chart(TWO, tmp_path / "chart.pdf")
    with pytest.raises(InputError, match="0 runs"):
        draw_chart([], tmp_path / "chart.svg")
    with pytest.raises(InputError, match="encoder depths 24 and 8"):
        draw_chart([TWO[0], DEEP[0]], tmp_path / "chart.svg")
    with pytest.raises(RunError, match="nothing to draw"):
        draw_chart([("run", make_run([0.1], metrics=()))], tmp_path / "chart.svg")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        draw_chart(TWO, tmp_path / "file" / "chart.svg")
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    with pytest.raises(ExitsafeError, match=r"pip install \"exitsafe\[report\]\""):
        draw_chart(TWO, tmp_path / "chart.svg")
    assert not (tmp_path / "chart.svg").exists()
