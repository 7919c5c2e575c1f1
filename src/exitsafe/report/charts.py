"""Which charts the page has: runs in, figures out, each with the table of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exitsafe.report.categories import CategoryRates
from exitsafe.report.chart import LabelledRun
from exitsafe.report.facts import Row, Table, exit_name, layer_estimates, measured, metric_table
from exitsafe.report.figures import Cell, Line, Point, Spot, heat_chart, line_chart, scatter_chart
from exitsafe.report.looks import LOOKS
from exitsafe.report.names import judge_names, numbered, shown
from exitsafe.report.svg import to_svg
from exitsafe.runs.finished import title_in
from exitsafe.runs.metrics import METRICS, Metric, as_noun, meaning_of
from exitsafe.runs.numbers import amount, is_rate, listed, percent

if TYPE_CHECKING:
    from markupsafe import Markup

Results = Mapping[str, Any]
"""A summary, or one judge's part of it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its words and numbers.

    Args:
        name: Its id on the page.
        title, note: What it shows, and how to read it.
        svg: The drawing.
        table: Its numbers.
    """

    name: str
    title: str
    note: str
    svg: Markup
    table: Table


def metric_figures(runs: Sequence[LabelledRun]) -> Iterator[Figure]:
    """One chart per metric by exit layer; where several judges have it, one per judge."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    for metric in METRICS:
        judges = list(dict.fromkeys(name for _, run in runs for name in _judges_with(run.summary, metric)))
        for judge in judges if len(judges) > 1 else [None]:
            results = [(run.summary["judges"].get(judge) if judge else run.summary) for _, run in runs]
            own = [run for _, run in runs if not judge or judge in dict(run.judges)]
            title = f"{own[0].title(metric.name, judge)}, by {called[judge]}" if judge else title_in(own, metric.name)
            meanings = dict.fromkeys(meaning_of(metric, run.proxy_of(metric.name, judge)) for run in own)
            number = judges.index(judge) + 1 if judge else 0
            found = _metric_figure(
                runs,
                results,
                metric,
                title=title,
                note=" / ".join(meanings),
                name=f"chart-{metric.name.replace('_', '-')}-{number}",
            )
            if found is not None:
                yield found


def scatter_figure(runs: Sequence[LabelledRun]) -> Figure | None:
    """Attack success against the first utility that was measured; None without either."""
    every = [run for _, run in runs]
    attacks = title_in(every, "asr")
    for metric, better in (("vqa_accuracy", "right"), ("over_refusal", "left"), ("benign_refusal", "left")):
        spots = [_spots(run.summary, metric) for _, run in runs]
        if any(spots):
            other = title_in(every, metric)
            title = f"{attacks} against {as_noun(other)}"
            chart = scatter_chart(
                [(look, found) for look, found in zip(LOOKS, spots, strict=False) if found],
                default_exit=runs[0][1].summary["default_exit"],
                x_title=other,
                y_title=attacks,
            )
            note = (
                "A marker per run and exit, named by its exit layer; the default exit is filled. Bars are 95% "
                f"intervals. Better is down and to the {better}."
            )
            table = _scatter_table(title, metric, runs, spots, headings=(attacks, other))
            said = " ".join(
                f"{shown(label)}: "
                + "; ".join(f"exit {s.exit_layer} {percent(s.x.value)}, {percent(s.y.value)}" for s in found)
                + "."
                for (label, _), found in zip(runs, spots, strict=True)
            )
            svg = to_svg(
                chart, name="chart-scatter", title=title, description=f"{as_noun(other)}, {as_noun(attacks)}. {said}"
            )
            return Figure(name="chart-scatter", title=title, note=note, svg=svg, table=table)
    return None


def category_figures(runs: Sequence[LabelledRun], rates: Sequence[CategoryRates | None]) -> Iterator[Figure]:
    """A heat map per run that has more than one category."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    for number, ((label, run), found) in enumerate(zip(runs, rates, strict=True), 1):
        if found is None:
            continue
        names = {category: category_name(category) for category in found.rates}
        rows = numbered(list(names.values()))
        cells = [
            Cell(exit_layer=layer, row=row, value=None if estimate is None else estimate.value)
            for row, by_layer in zip(rows, found.rates.values(), strict=True)
            for layer in run.exit_layers
            for estimate in [by_layer.get(layer)]
        ]
        title = f"{shown(label)}: {as_noun(run.title('asr', found.judge))} by category and exit layer"
        note = f"Percent, by {called[found.judge]}. A dash: nothing could be scored."
        if found.num_left_out:
            note += f" {found.num_left_out} smaller categories are left out."
        worst = max((c for c in cells if c.value is not None), key=lambda c: c.value or 0.0, default=None)
        said = (
            ""
            if worst is None
            else f"The highest rate is {percent(worst.value or 0.0)}, in {worst.row} at exit {worst.exit_layer}."
        )
        table = Table(
            caption=title,
            columns=("category", "exit", "value", "95% interval", "n", "unscored"),
            rows=tuple(
                Row(cells=(row, exit_name(layer, run.summary["default_exit"]), *measured("asr", vars(estimate))))
                for row, by_layer in zip(rows, found.rates.values(), strict=True)
                for layer, estimate in by_layer.items()
            ),
            num_names=2,
        )
        chart = heat_chart(cells, rows=rows, exit_layers=run.exit_layers)
        svg = to_svg(chart, name=f"chart-categories-{number}", title=title, description=f"{said} {_SEE_TABLE}".strip())
        yield Figure(name=f"chart-categories-{number}", title=title, note=note, svg=svg, table=table)


def category_name(category: str) -> str:
    """As it may be shown."""
    return shown(category, max_length=40) if category.strip() else "(none)"


_SEE_TABLE = "All numbers are in the table below it."


def _metric_figure(
    runs: Sequence[LabelledRun], results: Sequence[Results | None], metric: Metric, *, title: str, note: str, name: str
) -> Figure | None:
    lines, tabled, said = [], [], []
    for (label, run), part, look in zip(runs, results, LOOKS, strict=False):
        points = () if part is None else _points(part, metric.name)
        if part is None or not layer_estimates(part, metric.name):
            continue
        tabled.append((shown(label), part, int(run.summary["default_exit"])))
        if points:
            lines.append(Line(look=look, points=points))
            said.append(f"{shown(label)}: {_in_words(metric.name, points, int(run.summary['default_exit']))}.")
    if not tabled:
        return None
    default_exit = int(runs[0][1].summary["default_exit"])
    chart = line_chart(
        lines,
        exit_layers=sorted({layer for _, run in runs for layer in run.exit_layers}),
        default_exit=default_exit,
        is_rate=is_rate(metric.name),
        from_zero=metric.name != "reward",
    )
    svg = to_svg(chart, name=name, title=f"{title} by exit layer", description=f"{' '.join(said)} {_SEE_TABLE}")
    return Figure(name=name, title=title, note=note, svg=svg, table=metric_table(title, metric.name, tabled))


def _points(results: Results, metric: str) -> tuple[Point, ...]:
    return tuple(
        Point(exit_layer=layer, value=found["value"], low=found["low"], high=found["high"])
        for layer, found in layer_estimates(results, metric).items()
        if found["value"] is not None
    )


def _judges_with(summary: Results, metric: Metric) -> list[str]:
    if metric.is_own:
        return []
    return [name for name, results in summary["judges"].items() if layer_estimates(results, metric.name)]


def _in_words(metric: str, points: Sequence[Point], default_exit: int) -> str:
    chosen = {point.exit_layer: point for point in (points[0], *points, points[-1])}
    ends = dict.fromkeys((points[0].exit_layer, default_exit, points[-1].exit_layer))
    return listed([f"{amount(metric, chosen[layer].value)} at exit {layer}" for layer in ends if layer in chosen])


def _spots(summary: Results, metric: str) -> list[Spot]:
    xs, ys = ({point.exit_layer: point for point in _points(summary, name)} for name in (metric, "asr"))
    return [Spot(exit_layer=layer, x=xs[layer], y=ys[layer]) for layer in xs if layer in ys]


def _scatter_table(
    title: str,
    metric: str,
    runs: Sequence[LabelledRun],
    spots: Sequence[Sequence[Spot]],
    *,
    headings: Sequence[str],
) -> Table:
    rows = []
    for (label, run), found in zip(runs, spots, strict=True):
        asr, other = (layer_estimates(run.summary, name) for name in ("asr", metric))
        default = run.summary["default_exit"]
        rows += [
            Row(
                cells=(
                    exit_name(s.exit_layer, default),
                    shown(label),
                    *measured("asr", asr[s.exit_layer]),
                    *measured(metric, other[s.exit_layer]),
                ),
                is_default=s.exit_layer == default,
            )
            for s in found
        ]
    measures = [f"{heading}{what}" for heading in headings for what in ("", ": 95% interval", ": n", ": unscored")]
    return Table(caption=title, columns=("exit", "run", *measures), rows=tuple(rows), num_names=2)
