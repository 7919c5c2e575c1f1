"""Which charts there are: runs in, figures for the page and chart files out. Labels are drawn as given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exitsafe.errors import InputError, RunError
from exitsafe.results.comparison import check_comparable
from exitsafe.results.metrics import BY_NAME, METRICS, Metric, as_noun, judge_of, meaning_of
from exitsafe.results.numbers import amount, is_rate, listed, percent
from exitsafe.results.run import AuditRun, title_in
from exitsafe.show.drawing import LOOKS, Cell, Line, Point, figure_of, heat_chart, line_chart, to_png, to_svg
from exitsafe.show.html_page import check_can_render
from exitsafe.show.names import judge_names, numbered, shown
from exitsafe.show.table import Table
from exitsafe.show.tables import LabelledRun, Series, exit_table, series_of
from exitsafe.stats import Estimate
from exitsafe.stats import layer_estimates as estimates_by_layer
from exitsafe.store.files import writing

FORMATS = (".svg", ".png")
MAX_CATEGORIES = 40
"""The page says how many categories beyond these it leaves out."""
_PANELS = {"asr": "harmful requests", "over_refusal": "borderline requests", "vqa_accuracy": "picture questions"}
_SEE_TABLE = "All numbers are in the table below it."


# ---- chart files ----


def draw_chart(runs: Sequence[LabelledRun], path: str | Path, *, title: str | None = None) -> Path:
    """Draw attack success, over-refusal and VQA accuracy by exit layer, a line per run with its 95% band.

    Reads the runs' summaries only: a chart file contains no requests, answers or pictures.

    Args:
        runs: (label, run) pairs of one model, the baseline first.
        path: The file to write; its ending, .svg or .png, is the format.
        title: Above the figure; by default it names the model.

    Returns:
        The path.

    Raises:
        InputError: On another ending, no runs, more runs than there are line styles, or encoders that differ.
        RunError: If no run has one of the three metrics, or the file cannot be written.
        ExitsafeError: Without the extra `report`.
    """
    path = Path(path)
    check_can_draw(path)
    check_runs(runs)
    default_exit = runs[0][1].default_exit
    panels, counts = [], []
    for metric, unit in _PANELS.items():
        lines = list(_lines(runs, metric).values())
        if lines:
            chart = line_chart(lines, exit_layers=_exit_layers(runs), default_exit=default_exit, size=(250, 210))
            aim = "lower is better" if BY_NAME[metric].direction == "lower" else "higher is better"
            panels.append((title_in((run for _, run in runs), metric), aim, chart))
            counts.append(f"{_range_of_n(runs, metric)} {unit}")
    if not panels:
        raise RunError("nothing to draw: no run has attack success, over-refusal or VQA accuracy; audit such samples")
    title = title or f"{runs[0][1].summary['model']}: safety and utility by exit layer"
    notes = [
        f"n per exit layer: {', '.join(counts)}.",
        "Bands: 95% intervals. Default: the exit of the untouched model.",
    ]
    figure = figure_of(panels, [label for label, _ in runs], title=title, notes=notes)
    is_svg = path.suffix.lower() == ".svg"
    svg = to_svg(figure, name="chart", title=title, description=" ".join(notes), is_file=True) if is_svg else ""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(svg.encode() if is_svg else to_png(figure))
    return path


def check_can_draw(path: Path) -> None:
    """Check that `path` can be drawn, before the work whose chart it is.

    Raises:
        InputError: On an ending other than .svg and .png.
        ExitsafeError: Without the extra `report`.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: charts are {' or '.join(FORMATS)} files; choose one of these endings")
    check_can_render()


def check_runs(runs: Sequence[LabelledRun]) -> None:
    """Check that the runs can be shown together.

    Raises:
        InputError: On no runs, more than there are line styles, or models whose exits mean different things.
    """
    if not 1 <= len(runs) <= len(LOOKS):
        raise InputError(f"cannot show {len(runs)} runs together; give 1 to {len(LOOKS)}")
    check_comparable([run for _, run in runs])


def _range_of_n(runs: Sequence[LabelledRun], metric: str) -> str:
    found = [estimate.n for _, run in runs for estimate in run.at_exits(metric).values()]
    return str(min(found)) if min(found) == max(found) else f"{min(found)} to {max(found)}"


# ---- the page's figures ----


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its words and numbers.

    Args:
        name: Its id on the page.
        title, note: What it shows, and how to read it.
        svg: The drawing, which is safe to embed as it is.
        table: Its numbers.
    """

    name: str
    title: str
    note: str
    svg: str
    table: Table


def metric_figures(runs: Sequence[LabelledRun]) -> Iterator[Figure]:
    """A line chart per metric; where several judges measure it, one per judge, the judge that reports it first."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    for metric in METRICS:
        judges = [] if metric.is_own else list(dict.fromkeys(n for _, run in runs for n in _judges_with(run, metric)))
        for number, judge in enumerate(judges, 1) if len(judges) > 1 else [(0, None)]:
            own = [run for _, run in runs if not judge or judge in dict(run.judges)]
            title = f"{own[0].title(metric.name, judge)}, by {called[judge]}" if judge else title_in(own, metric.name)
            meanings = dict.fromkeys(meaning_of(metric, run.proxy_of(metric.name, judge)) for run in own)
            name = f"chart-{metric.name.replace('_', '-')}-{number}"
            found = _metric_figure(runs, metric.name, judge, title=title, note=" / ".join(meanings), name=name)
            if found is not None:
                yield found


def category_figures(runs: Sequence[LabelledRun]) -> Iterator[Figure]:
    """A heat map per run that has more than one category."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    for number, (label, run) in enumerate(runs, 1):
        judge, rates, num_left_out = category_rates(run)
        if not rates:
            continue
        rows = numbered([shown(name, max_length=40) if name.strip() else "(none)" for name in rates])
        by_row = dict(zip(rows, rates.values(), strict=True))
        columns = [
            Series(heading=row, run=run, metric="asr", estimates=dict(found.items())) for row, found in by_row.items()
        ]
        cells = [
            Cell(exit_layer=layer, row=row, value=found[layer].value if layer in found else None)
            for row, found in by_row.items()
            for layer in run.exit_layers
        ]
        title = f"{label}: {as_noun(run.title('asr', judge))} by category and exit layer"
        note = f"Percent, judged by {called[judge]}. A dash means that nothing could be scored."
        if num_left_out:
            note += f" {num_left_out} smaller categories are left out."
        name = f"chart-categories-{number}"
        yield Figure(
            name=name,
            title=title,
            note=note,
            svg=to_svg(
                heat_chart(cells, rows=rows, exit_layers=run.exit_layers),
                name=name,
                title=title,
                description=f"{_highest(cells)}{_SEE_TABLE}",
            ),
            table=exit_table(title, columns),
        )


def category_rates(run: AuditRun) -> tuple[str, dict[str, dict[int, Estimate]], int]:
    """Attack success by category and exit layer, those with most samples first.

    Returns:
        The judge, the rates by category, and how many smaller categories are left out. No rates if nobody judged
        attack success or all harmful samples are of one category.
    """
    metric, table = BY_NAME["asr"], run.score_table()
    judge = judge_of(metric, run.judges)
    scores = None if judge is None else table.scores.get((judge, metric.measure))
    rows = table.of_kinds(metric.kinds)
    of_row = np.array([table.samples[row].category for row in rows], dtype=object)
    counts = Counter(of_row.tolist())
    if judge is None or scores is None or len(counts) < 2:
        return "", {}, 0
    chosen = sorted(counts, key=lambda category: (-counts[category], category))
    harmful, rates = scores.of_samples(rows), {}
    for category in chosen[:MAX_CATEGORIES]:
        own = harmful.of_samples(np.flatnonzero(of_row == category))
        rates[category] = estimates_by_layer(
            own.values, own.unscored, exit_layers=table.exit_layers, bounds=metric.bounds
        )
    return judge, rates, len(chosen[MAX_CATEGORIES:])


def _metric_figure(
    runs: Sequence[LabelledRun], metric: str, judge: str | None, *, title: str, note: str, name: str
) -> Figure | None:
    columns = [column for label, run in runs if (column := series_of(label, run, metric, judge)).estimates]
    if not columns:
        return None
    default_exit, lines = runs[0][1].default_exit, _lines(runs, metric, judge)
    chart = line_chart(
        list(lines.values()),
        exit_layers=_exit_layers(runs),
        default_exit=default_exit,
        is_rate=is_rate(metric),
        from_zero=metric != "reward",
        size=(420, 230) if metric == "asr" else (330, 190),
    )
    said = [f"{label}: {_in_words(metric, points, default_exit)}." for label, (_, points) in lines.items()]
    svg = to_svg(chart, name=name, title=f"{title} by exit layer", description=" ".join([*said, _SEE_TABLE]))
    return Figure(name=name, title=title, note=note, svg=svg, table=exit_table(f"{title} by exit layer", columns))


def _lines(runs: Sequence[LabelledRun], metric: str, judge: str | None = None) -> dict[str, Line]:
    """By label, the line of each run that has the metric, in the look of its place."""
    return {
        label: (look, points)
        for (label, run), look in zip(runs, LOOKS, strict=False)
        if (points := _points(run, metric, judge))
    }


def _points(run: AuditRun, metric: str, judge: str | None) -> list[Point]:
    return [
        Point(exit_layer=layer, value=found.value, low=found.low, high=found.high)
        for layer, found in run.at_exits(metric, judge).items()
        if found.value is not None and found.low is not None and found.high is not None
    ]


def _exit_layers(runs: Sequence[LabelledRun]) -> list[int]:
    return sorted({layer for _, run in runs for layer in run.exit_layers})


def _judges_with(run: AuditRun, metric: Metric) -> list[str]:
    return [judge for judge in run.summary["judges"] if run.at_exits(metric.name, judge)]


def _in_words(metric: str, points: Sequence[Point], default_exit: int) -> str:
    values = {point.exit_layer: point.value for point in points}
    ends = dict.fromkeys((points[0].exit_layer, default_exit, points[-1].exit_layer))
    return listed([f"{amount(metric, values[layer])} at exit {layer}" for layer in ends if layer in values])


def _highest(cells: Sequence[Cell]) -> str:
    value, place = max(((c.value, c) for c in cells if c.value is not None), key=lambda x: x[0], default=(None, None))
    if value is None or place is None:
        return ""
    return f"The highest rate is {percent(value)}, in {place.row} at exit {place.exit_layer}. "
