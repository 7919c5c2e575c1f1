"""The page's tables: summaries and comparisons in, rows of text out. Knows no markup: the template escapes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exitsafe.comparison import Comparison, Difference
from exitsafe.report.chart import LabelledRun
from exitsafe.report.names import judge_names, shown
from exitsafe.runs import AuditRun
from exitsafe.runs.finished import title_in
from exitsafe.runs.metrics import AGGREGATES, BY_NAME, METRICS
from exitsafe.runs.numbers import amount, change, count, fixed, interval, is_rate, p_value, percent
from exitsafe.stats import BINS, bootstrap_p_value, layers_by_bin
from exitsafe.stats.bootstrap import RESAMPLES

Summary = Mapping[str, Any]
LEVEL = 0.05
_NEARLY = 1.5  # a resample without the metric moves the least p a little; the next one is twice as large


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table; the first cell is its heading."""

    cells: tuple[str, ...]
    is_default: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Args:
        caption: What it shows, in a line.
        columns: Headings.
        rows: As many cells each.
        num_names: How many columns, from the left, hold names rather than numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    num_names: int = 1


_MEASURED = ("value", "95% interval", "n", "unscored")


def layer_estimates(results: Mapping[str, Any], metric: str) -> dict[int, Mapping[str, Any]]:
    """A metric by exit layer, of a summary or of one judge's part of it."""
    return {row["exit_layer"]: row["metrics"][metric] for row in results["layers"] if metric in row["metrics"]}


def metric_table(title: str, metric: str, runs: Sequence[tuple[str, Summary, int]]) -> Table:
    """A metric by exit layer and run, with all that it rests on.

    Args:
        title: The metric's name.
        metric: As in summary.json.
        runs: Label, summary or a judge's part of it, and the default exit.
    """
    found = [(label, layer_estimates(results, metric), default) for label, results, default in runs]
    layers = sorted({layer for _, estimates, _ in found for layer in estimates})
    return Table(
        caption=f"{title} by exit layer",
        columns=("exit", "run", *_MEASURED),
        rows=tuple(
            Row(
                cells=(exit_name(layer, default), label, *measured(metric, estimates[layer])),
                is_default=layer == default,
            )
            for layer in layers
            for label, estimates, default in found
            if layer in estimates
        ),
        num_names=2,
    )


def bin_table(runs: Sequence[LabelledRun]) -> Table | None:
    """AASR, ATS and ATR of arXiv 2411.04291, a column per bin, and the same means of what a repair may cost."""
    bins = (*BINS, "average")
    rows = []
    for metric in (*AGGREGATES, "over_refusal", "benign_refusal", "vqa_accuracy"):
        for label, run in runs:
            found = {name: entry["metrics"].get(metric) for name, entry in run.summary["bins"].items()}
            if any(found.values()):
                cells = (_bin_cell(metric, found.get(name), missing_exits(run.summary, name)) for name in bins)
                rows.append(Row(cells=(_bin_metric(run, metric), shown(label), *cells)))
    caption = "Means over the exits of a bin, and over the three bins, with 95% intervals"
    return Table(caption=caption, columns=("mean of", "run", *bins), rows=tuple(rows), num_names=2) if rows else None


def missing_exits(summary: Summary, name: str) -> str:
    """Nothing where every exit of the bin was audited, else how many were: such a mean is not the paper's."""
    num_layers, audited = summary["num_layers"], [row["exit_layer"] for row in summary["layers"]]
    whole, found = layers_by_bin(range(1, num_layers + 1), num_layers), layers_by_bin(audited, num_layers)
    if name == "average":
        return "" if found == whole else f"{len(audited)} of {num_layers} exits"
    return "" if found.get(name) == whole.get(name) else f"{len(found.get(name, []))} of {len(whole[name])} exits"


def _bin_cell(metric: str, found: Mapping[str, Any] | None, missing: str) -> str:
    if found is None:
        return ""
    notes = [count(found["n"], found["unscored"]), *filter(None, [missing])]
    if found["value"] is None:
        return f"none scored ({', '.join(notes)})"
    band = interval(metric, found["low"], found["high"])
    return f"{amount(metric, found['value'])} ({band}; {', '.join(notes)})"


def agreement_table(runs: Sequence[LabelledRun]) -> Table | None:
    """Cohen's kappa of every two judges; None where no two judged the same."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    rows = [
        Row(cells=_agreement_cells(label, run, pair, called))
        for label, run in runs
        for pair in run.summary["agreement"]
    ]
    columns = ("measure", "run", "first judge", "second judge", "agree on", "kappa", "95% interval", "n", "unscored")
    return Table(caption="How far judges agree", columns=columns, rows=tuple(rows), num_names=4) if rows else None


def against_default_tables(run: AuditRun) -> Iterator[tuple[str, Table]]:
    """Per metric: a line that says how many exits differ from the default one, and the tests."""
    layers = run.summary["against_default"]["layers"]
    for metric in (each.name for each in METRICS if any(each.name in row["metrics"] for row in layers)):
        found = {row["exit_layer"]: row["metrics"][metric] for row in layers if metric in row["metrics"]}
        num_apart = sum(test["p_adjusted"] < LEVEL for test in found.values())
        rows = tuple(
            Row(
                cells=(
                    str(layer), f"{test['n']:,}", f"{test['unscored']:,}",
                    amount(metric, test["at_default"]), amount(metric, test["at_layer"]),
                    change(metric, test["difference"]), _change_interval(metric, test["low"], test["high"]),
                    _effect(test["effect_size"]), *_p_values(test, num_clusters=test["n"]),
                )
            )
            for layer, test in found.items()
        )  # fmt: skip
        columns = ("exit", "pairs", "unscored", "at default", "at exit", *_tested(metric, _measure_of(found.values())))
        title = run.title(metric)
        headline = f"{title}: {num_apart} of {len(found)} exits differ from the default exit"
        yield headline, Table(caption=f"{title} against the default exit", columns=columns, rows=rows)


def comparison_tables(comparison: Comparison, before: str, after: str) -> Iterator[tuple[str, Table]]:
    """Per metric: a line that says how many exits changed, and the tests per exit and bin."""
    for metric in comparison.metrics:
        found = comparison.rows(metric)
        tested = [row for row in found if row.p_adjusted is not None]
        num_apart = sum(row.p_adjusted < LEVEL for row in tested if row.p_adjusted is not None)
        columns = ("exit", "pairs", "unscored", before, after, *_tested(metric, found[0].effect_measure))
        rows = tuple(_difference_row(row, comparison.default_exit, num_clusters=_clusters(found)) for row in found)
        title = comparison.titles[metric]
        headline = f"{title}: {num_apart} of {len(tested)} exits differ"
        yield headline, Table(caption=f"{title}, {before} and {after}", columns=columns, rows=rows)


def worst_table(runs: Sequence[LabelledRun], metrics: Sequence[str]) -> Table | None:
    """Worst exits, each chosen on one half of the samples and measured on the other, and with the halves swapped."""
    rows = []
    for metric in metrics:
        for label, run in runs:
            worst = run.summary["worst"].get(metric)
            for half, found in (("first", worst), ("second", None if worst is None else worst["swapped"])):
                if found is not None:
                    exit_layer = exit_name(found["exit_layer"], run.summary["default_exit"])
                    rows.append(Row(cells=(run.title(metric), label, half, exit_layer, *measured(metric, found))))
    columns = ("measure", "run", "chosen on half", "worst exit", *_MEASURED)
    caption = "Worst exits, each measured on the half of the requests that did not choose it"
    return Table(caption=caption, columns=columns, rows=tuple(rows), num_names=3) if rows else None


_AT_A_GLANCE = ("asr", "over_refusal", "vqa_accuracy")


def overview_table(runs: Sequence[LabelledRun]) -> Table:
    """What matters most, a row per run: at the worst exit, at the default exit and on average over the bins."""
    found = {
        label: {
            (metric, place): found
            for metric in _AT_A_GLANCE
            for place, found in (
                ("worst exit", run.summary["worst"].get(metric)),
                ("default exit", layer_estimates(run.summary, metric).get(run.summary["default_exit"])),
                ("average", run.summary["bins"].get("average", {}).get("metrics", {}).get(metric)),
            )
            if found is not None and found["value"] is not None
        }
        for label, run in runs
    }
    every = [run for _, run in runs]
    places = list(dict.fromkeys(place for cells in found.values() for place in cells))
    return Table(
        caption="Values with 95% intervals; a worst exit is measured on the half that did not choose it",
        columns=("run", *(f"{title_in(every, metric)}, {place}" for metric, place in places)),
        rows=tuple(
            Row(cells=(label, *(_short(place[0], cells.get(place)) for place in places)))
            for label, cells in found.items()
        ),
    )


def _short(metric: str, found: Mapping[str, Any] | None) -> str:
    return (
        "" if found is None else f"{amount(metric, found['value'])} ({interval(metric, found['low'], found['high'])})"
    )


LOWER, HIGHER, NOT_SHOWN = "lower", "higher", "no difference could be shown"


def verdict(row: Difference) -> str:
    """What a test says: over exits with Holm's correction, for a bin by itself."""
    p = row.p_value if row.p_adjusted is None else row.p_adjusted
    if p >= LEVEL:
        return NOT_SHOWN
    return LOWER if row.difference < 0 else HIGHER


def change_table(comparison: Comparison, metric: str, before: str, after: str) -> Table:
    """A metric at the default exit and in bins, with the word for what its test says."""
    default_exit, every = comparison.default_exit, comparison.rows(metric)
    rows = [row for row in every if row.place in (default_exit, *BINS, "average")]
    num_clusters = _clusters(every)
    columns = ("exits", "pairs", "unscored", before, after, *_tested(metric, rows[0].effect_measure), "after is")
    return Table(
        caption=f"{comparison.titles[metric]}, {before} and {after}",
        columns=columns,
        rows=tuple(
            Row(
                cells=(
                    *(found := _difference_row(row, default_exit, num_clusters=num_clusters)).cells,
                    verdict(row).replace(NOT_SHOWN, "not shown to differ"),
                ),
                is_default=found.is_default,
            )
            for row in rows
        ),
    )


def exit_name(exit_layer: int | str, default_exit: int) -> str:
    """With a word where it is the default."""
    return f"{exit_layer} (default)" if exit_layer == default_exit else str(exit_layer)


def measured(metric: str, found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Value, interval, n and unscored."""
    counts = f"{found['n']:,}", f"{found['unscored']:,}"
    if found["value"] is None:
        return "none scored", "", *counts
    return amount(metric, found["value"]), interval(metric, found["low"], found["high"]), *counts


def _bin_metric(run: AuditRun, metric: str) -> str:
    """With the paper's name of the mean, which is not one of what a proxy counts."""
    has_name = metric in AGGREGATES and not run.proxy_of(metric).get(BY_NAME[metric].measure)
    return f"{run.title(metric)} ({AGGREGATES[metric]})" if has_name else run.title(metric)


def _agreement_cells(label: str, run: AuditRun, pair: Mapping[str, Any], called: Mapping[str, str]) -> tuple[str, ...]:
    kappa = f"none: {pair['undefined']}" if pair["kappa"] is None else fixed(pair["kappa"], 2)
    titles = dict.fromkeys(run.title(pair["measure"], pair[place]) for place in ("first", "second"))
    return (
        " / ".join(titles),
        shown(label),
        called[pair["first"]],
        called[pair["second"]],
        "" if pair["observed"] is None else percent(pair["observed"]),
        kappa,
        "" if pair["kappa"] is None else f"{fixed(pair['low'], 2)} to {fixed(pair['high'], 2)}",
        f"{pair['n']:,}",
        f"{pair['unscored']:,}",
    )


def _clusters(rows: Sequence[Difference]) -> int:
    """The requests that a metric's tests draw from."""
    return max((row.n for row in rows if isinstance(row.place, int)), default=1)


def _p_values(test: Mapping[str, Any], *, num_clusters: int) -> tuple[str, str]:
    """p and, where there is one, Holm's; marked where as many resamples cannot show less."""
    p, adjusted = test["p_value"], test["p_adjusted"]
    is_least = test["test"] == "bootstrap" and p < _NEARLY * bootstrap_p_value(
        np.ones(RESAMPLES), num_clusters=num_clusters
    )
    return p_value(p, is_least=is_least), "" if adjusted is None else p_value(adjusted, is_least=is_least)


def _difference_row(row: Difference, default_exit: int, *, num_clusters: int) -> Row:
    metric = row.metric
    cells = (
        exit_name(row.place, default_exit), f"{row.n:,}", f"{row.unscored:,}",
        amount(metric, row.before), amount(metric, row.after),
        change(metric, row.difference), _change_interval(metric, row.low, row.high),
        _effect(row.effect_size), *_p_values(vars(row), num_clusters=num_clusters),
    )  # fmt: skip
    return Row(cells=cells, is_default=row.place == default_exit)


def _tested(metric: str, effect_measure: str) -> tuple[str, ...]:
    unit = " (points)" if is_rate(metric) else ""
    effect = "Cohen's h" if effect_measure == "cohen_h" else "d_av"
    return f"change{unit}", "95% interval", effect, "p", "p (Holm)"


def _measure_of(tests: Any) -> str:
    return str(next(iter(tests))["effect_measure"])


def _change_interval(metric: str, low: float, high: float) -> str:
    return f"{change(metric, low)} to {change(metric, high)}"


def _effect(size: float | None) -> str:
    return "" if size is None else fixed(size, 2, is_signed=True)
