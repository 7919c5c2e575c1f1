"""Chart files, and the figures whose numbers a page does not get from a summary."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.show import html_page
from exitsafe.show.charts import MAX_CATEGORIES, category_figures, category_rates, draw_chart
from exitsafe.show.tables import LabelledRun
from tests.show.page_runs import write_run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledRun]:
    folder = tmp_path_factory.mktemp("runs")
    labels = {"before": 2, "after L-PPO": 0}
    return [(label, write_run(folder / label, harmful_until=until)) for label, until in labels.items()]


def test_text_stays_text_and_the_same_runs_give_the_same_bytes(two: list[LabelledRun], tmp_path: Path) -> None:
    svg = draw_chart(two, tmp_path / "chart.svg").read_text()
    texts = re.findall(r"<(?:text|tspan)[^>]*>([^<]*)</", svg)
    assert "organism: safety and utility by exit layer" in texts
    for text in ("before", "after L-PPO", "Attack success", "Over-refusal", "VQA accuracy", "default"):
        assert text in texts
    assert "n per exit layer: 8 harmful requests, 8 borderline requests, 8 picture questions." in texts
    assert '<title id="chart-title">organism: safety and utility by exit layer</title>' in svg
    assert 'fill="#ffffff"' in svg and "font-family=" in svg
    assert draw_chart(two, tmp_path / "again.svg").read_text() == svg


def test_a_png_is_an_image_and_always_the_same(two: list[LabelledRun], tmp_path: Path) -> None:
    path = draw_chart(two, tmp_path / "new" / "chart.PNG", title="Mine")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1600
    assert draw_chart(two, tmp_path / "again.png", title="Mine").read_bytes() == path.read_bytes()


def test_a_metric_that_no_run_has_gets_no_panel(tmp_path: Path) -> None:
    judges = {"before <b>": [("guard", ["asr"])], "after": [("guard", ["refusal"])]}
    some = [(label, write_run(tmp_path / label, harmful_until=1, judges=own)) for label, own in judges.items()]
    svg = draw_chart(some, tmp_path / "chart.svg").read_text()
    assert "Over-refusal" in svg
    assert "VQA accuracy" not in svg
    assert svg.count(">before &lt;b&gt;<") == svg.count(">after<") == 1


def test_what_cannot_be_drawn(two: list[LabelledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = write_run(tmp_path / "deep", harmful_until=1, num_layers=6)
    bare = write_run(tmp_path / "bare", harmful_until=1, judges=[("coherence", ["coherence"])])
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        draw_chart(two, tmp_path / "chart.pdf")
    with pytest.raises(InputError, match="0 runs"):
        draw_chart([], tmp_path / "chart.svg")
    with pytest.raises(InputError, match="encoder depths 4 and 6"):
        draw_chart([two[0], ("deep", deep)], tmp_path / "chart.svg")
    with pytest.raises(RunError, match="nothing to draw"):
        draw_chart([("run", bare)], tmp_path / "chart.svg")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        draw_chart(two, tmp_path / "file" / "chart.svg")
    monkeypatch.setattr(html_page, "find_spec", lambda name: None)
    with pytest.raises(ExitsafeError, match=r"pip install \"exitsafe\[report\]\""):
        draw_chart(two, tmp_path / "chart.svg")
    assert not (tmp_path / "chart.svg").exists()


def test_categories_by_size_with_a_bound(tmp_path: Path) -> None:
    names = ["z", *(f"c{n}" for n in range(MAX_CATEGORIES + 1))]
    samples = 4 * (len(names) + 1)  # the first twice
    run = write_run(
        tmp_path / "run", harmful_until=1, num_samples=samples, num_layers=2, default_exit=2, categories=names
    )
    judge, rates, num_left_out = category_rates(run)
    assert (judge, num_left_out, len(rates)) == ("world-rule", 2, MAX_CATEGORIES)
    assert next(iter(rates)) == "z"
    assert [rates["z"][layer].value for layer in (1, 2)] == [1.0, 0.0]
    assert rates["z"][1].n == 2
    figure = next(iter(category_figures([("run", run)])))
    assert "2 smaller categories are left out" in figure.note
    assert len(figure.table.columns) == 1 + MAX_CATEGORIES


def test_one_category_is_not_a_heat_map(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", harmful_until=1, categories=["one"])
    assert category_rates(one)[1] == {}
    two = write_run(tmp_path / "two", harmful_until=2, is_unscored=lambda n, layer: n == 0 and layer == 1)
    rates = category_rates(two)[1]
    assert np.sum([by_layer[1].n + by_layer[1].unscored for by_layer in rates.values()]) == 8
