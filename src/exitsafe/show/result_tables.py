"""The page's tables: runs and comparisons in, rows of text out. Knows no markup: the template escapes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exitsafe.results.comparison import Comparison, Difference
from exitsafe.results.metrics import AGGREGATES, BY_NAME, METRICS
from exitsafe.results.numbers import amount, change, count, fixed, interval, is_rate, number_list, p_value, percent
from exitsafe.results.run import AuditRun
from exitsafe.show.names import judge_names, shown, without_folder
from exitsafe.stats import BINS, bootstrap_p_value, layers_by_bin
from exitsafe.stats.bootstrap import RESAMPLES

LabelledRun = tuple[str, AuditRun]
"""A run with its name on the page."""
Summary = Mapping[str, Any]
"""The content of summary.json, or one judge's part of it."""

COSTS = ("over_refusal", "benign_refusal", "vqa_accuracy")
"""What a repair may make worse."""
LEVEL = 0.05
LOWER, HIGHER, NOT_SHOWN = "lower", "higher", "not shown to differ"
MEASURED = ("value", "95% interval", "n", "unscored")
_NEARLY = 1.5  # a resample without the metric moves the smallest p a little; the next one is twice as large
_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{16,}\b")
_MAX_SETTING = 400


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


def layer_estimates(results: Summary, metric: str) -> dict[int, Mapping[str, Any]]:
    """A metric by exit layer."""
    return {row["exit_layer"]: row["metrics"][metric] for row in results["layers"] if metric in row["metrics"]}


def verdict_of(row: Difference) -> str:
    """What a test says: over exits with Holm's correction, for a bin by itself."""
    p = row.p_value if row.p_adjusted is None else row.p_adjusted
    if p >= LEVEL:
        return NOT_SHOWN
    return LOWER if row.difference < 0 else HIGHER


def metric_table(title: str, metric: str, runs: Sequence[tuple[str, Summary, int]]) -> Table:
    """A metric by exit layer and run, with what it rests on.

    Args:
        title: The metric's title.
        metric: As in summary.json.
        runs: Label, results and default exit.
    """
    found = [(label, layer_estimates(results, metric), default) for label, results, default in runs]
    rows = tuple(
        Row(cells=(exit_name(layer, default), label, *measured(metric, by_layer[layer])), is_default=layer == default)
        for layer in sorted({layer for _, by_layer, _ in found for layer in by_layer})
        for label, by_layer, default in found
        if layer in by_layer
    )
    return Table(caption=f"{title} by exit layer", columns=("exit", "run", *MEASURED), rows=rows, num_names=2)


def worst_table(runs: Sequence[LabelledRun]) -> Table | None:
    """Worst exits, each chosen on one half of the samples and measured on the other, and with the halves swapped."""
    rows = []
    for metric in ("asr", *COSTS):
        for label, run in runs:
            worst = run.summary["worst"].get(metric)
            for half, found in (("first", worst), ("second", None if worst is None else worst["swapped"])):
                if found is not None:
                    exit_layer = exit_name(found["exit_layer"], run.summary["default_exit"])
                    rows.append(Row(cells=(run.title(metric), label, half, exit_layer, *measured(metric, found))))
    columns = ("metric", "run", "chosen on half", "worst exit", *MEASURED)
    caption = "Worst exits, each measured on the half of the requests that did not choose it"
    return Table(caption=caption, columns=columns, rows=tuple(rows), num_names=3) if rows else None


def bin_table(runs: Sequence[LabelledRun]) -> Table | None:
    """AASR, ATS and ATR of arXiv 2411.04291, a column per bin, and the same means of what a repair may cost."""
    bins = (*BINS, "average")
    rows = []
    for metric in (*AGGREGATES, *COSTS):
        for label, run in runs:
            found = {name: entry["metrics"].get(metric) for name, entry in run.summary["bins"].items()}
            if any(found.values()):
                cells = (_bin_cell(metric, found.get(name), missing_exits(run.summary, name)) for name in bins)
                rows.append(Row(cells=(_bin_metric(run, metric), label, *cells)))
    caption = "Means over the exits of a bin, and over the three bins, with 95% intervals"
    return Table(caption=caption, columns=("mean of", "run", *bins), rows=tuple(rows), num_names=2) if rows else None


def missing_exits(summary: Summary, name: str) -> str:
    """Nothing where every exit of the bin was audited, else how many were: such a mean is not the paper's."""
    num_layers, audited = summary["num_layers"], [row["exit_layer"] for row in summary["layers"]]
    whole, found = layers_by_bin(range(1, num_layers + 1), num_layers), layers_by_bin(audited, num_layers)
    if name == "average":
        return "" if found == whole else f"{len(audited)} of {num_layers} exits"
    return "" if found.get(name) == whole.get(name) else f"{len(found.get(name, []))} of {len(whole[name])} exits"


def agreement_table(runs: Sequence[LabelledRun]) -> Table | None:
    """Cohen's kappa of every two judges; None where no two judged the same."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    rows = tuple(
        Row(cells=_agreement_cells(label, run, pair, called))
        for label, run in runs
        for pair in run.summary["agreement"]
    )
    columns = ("metric", "run", "first judge", "second judge", "agree on", "kappa", "95% interval", "n", "unscored")
    return Table(caption="How far judges agree", columns=columns, rows=rows, num_names=4) if rows else None


def against_default_tables(run: AuditRun) -> Iterator[tuple[str, Table]]:
    """Per metric: a line that says how many exits differ from the default one, and the tests."""
    layers = run.summary["against_default"]["layers"]
    for metric in (each.name for each in METRICS if any(each.name in row["metrics"] for row in layers)):
        found = {row["exit_layer"]: row["metrics"][metric] for row in layers if metric in row["metrics"]}
        num_apart = sum(test["p_adjusted"] < LEVEL for test in found.values())
        rows = tuple(
            Row(cells=(str(layer), *_test_cells(metric, test, "at_default", "at_layer", num_clusters=test["n"])))
            for layer, test in found.items()
        )
        measure = next(iter(found.values()))["effect_measure"]
        title = run.title(metric)
        headline = f"{title}: {num_apart} of {len(found)} exits differ from the default exit"
        columns = ("exit", *_test_columns(metric, measure, "at default", "at exit"))
        yield headline, Table(caption=f"{title} against the default exit", columns=columns, rows=rows)


def comparison_tables(comparison: Comparison, before: str, after: str) -> Iterator[tuple[str, Table]]:
    """Per metric: a line that says how many exits changed, and the tests per exit and bin."""
    default_exit = comparison.default_exit
    for metric in comparison.metrics:
        found = comparison.rows(metric)
        tested = [row for row in found if row.p_adjusted is not None]
        num_apart = sum(verdict_of(row) != NOT_SHOWN for row in tested)
        num_clusters = max((row.n for row in found if isinstance(row.place, int)), default=1)
        rows = tuple(
            Row(
                cells=(
                    exit_name(row.place, default_exit),
                    *_test_cells(metric, vars(row), "before", "after", num_clusters=num_clusters),
                    verdict_of(row),
                ),
                is_default=row.place == default_exit,
            )
            for row in found
        )
        title = comparison.titles[metric]
        columns = ("exit", *_test_columns(metric, found[0].effect_measure, before, after), f"{after} is")
        headline = f"{title}: {num_apart} of {len(tested)} exits differ"
        yield headline, Table(caption=f"{title}, {before} and {after}", columns=columns, rows=rows)


def method_table(runs: Sequence[LabelledRun]) -> Table:
    """What decides a run's answers and verdicts, a column per run."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    facts = [dict(_facts(run, called)) for _, run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    return Table(
        caption="What was audited and how",
        columns=("setting", *(label for label, _ in runs)),
        rows=tuple(Row(cells=(name, *(found.get(name, "") for found in facts))) for name in names),
        num_names=1 + len(runs),
    )


# ---- cells ----


def exit_name(exit_layer: int | str, default_exit: int) -> str:
    """With a word where it is the default."""
    return f"{exit_layer} (default)" if exit_layer == default_exit else str(exit_layer)


def measured(metric: str, found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Value, interval, n and unscored."""
    counts = f"{found['n']:,}", f"{found['unscored']:,}"
    if found["value"] is None:
        return "none scored", "", *counts
    return amount(metric, found["value"]), interval(metric, found["low"], found["high"]), *counts


def _bin_cell(metric: str, found: Mapping[str, Any] | None, missing: str) -> str:
    if found is None:
        return ""
    notes = ", ".join(filter(None, [count(found["n"], found["unscored"]), missing]))
    if found["value"] is None:
        return f"none scored ({notes})"
    return f"{amount(metric, found['value'])} ({interval(metric, found['low'], found['high'])}; {notes})"


def _bin_metric(run: AuditRun, metric: str) -> str:
    """With the paper's name of the mean, unless it is of what a proxy counts."""
    has_name = metric in AGGREGATES and not run.proxy_of(metric).get(BY_NAME[metric].measure)
    return f"{run.title(metric)} ({AGGREGATES[metric]})" if has_name else run.title(metric)


def _agreement_cells(label: str, run: AuditRun, pair: Mapping[str, Any], called: Mapping[str, str]) -> tuple[str, ...]:
    kappa = f"none: {pair['undefined']}" if pair["kappa"] is None else fixed(pair["kappa"], 2)
    titles = dict.fromkeys(run.title(pair["measure"], pair[place]) for place in ("first", "second"))
    observed = "" if pair["observed"] is None else percent(pair["observed"])
    band = "" if pair["kappa"] is None else f"{fixed(pair['low'], 2)} to {fixed(pair['high'], 2)}"
    judges = called[pair["first"]], called[pair["second"]]
    return " / ".join(titles), label, *judges, observed, kappa, band, f"{pair['n']:,}", f"{pair['unscored']:,}"


def _test_columns(metric: str, effect_measure: str, first: str, second: str) -> tuple[str, ...]:
    unit = " (points)" if is_rate(metric) else ""
    effect = "Cohen's h" if effect_measure == "cohen_h" else "d_av"
    return "pairs", "unscored", first, second, f"change{unit}", "95% interval", effect, "p", "p (Holm)"


def _test_cells(metric: str, test: Mapping[str, Any], first: str, second: str, *, num_clusters: int) -> tuple[str, ...]:
    """A paired test; p is marked where as many resamples cannot show less."""
    p, adjusted, effect = test["p_value"], test["p_adjusted"], test["effect_size"]
    least = bootstrap_p_value(np.ones(RESAMPLES), num_clusters=num_clusters)
    is_least = test["test"] == "bootstrap" and p < _NEARLY * least
    return (
        f"{test['n']:,}",
        f"{test['unscored']:,}",
        amount(metric, test[first]),
        amount(metric, test[second]),
        change(metric, test["difference"]),
        f"{change(metric, test['low'])} to {change(metric, test['high'])}",
        "" if effect is None else fixed(effect, 2, is_signed=True),
        p_value(p, is_least=is_least),
        "" if adjusted is None else p_value(adjusted, is_least=is_least),
    )


def _facts(run: AuditRun, called: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    settings, summary = run.settings, run.summary
    model: Mapping[str, Any] = settings.get("model", {})
    yield "model", shown(without_folder(str(summary["model"])))
    yield "family, blocks, default exit", f"{summary['family']}, {summary['num_layers']}, {summary['default_exit']}"
    yield "exits audited", number_list(list(run.exit_layers))
    for name in ("checkpoint", "adapter", "translators"):
        if name in model:
            yield name, "none" if model[name] is None else f"SHA-256 {model[name]}"
    for name in ("dtype", "quantization", "device", "attention", "processor"):
        if name in model:
            yield name, _spelt(model[name])
    for name in ("decoding", "batch_size", "skip_global", "stop_when"):
        if name in settings:
            yield name.replace("_", " "), _spelt(settings[name])
    data = settings.get("data", {})
    for suite, n in data.get("sources", {}).items():
        hub = (run.origin.get("hub") or {}).get(suite)  # the commit that it was read at
        yield (
            f"suite {shown(without_folder(suite)) or 'unnamed'}",
            f"{n:,} requests" + (f", {_spelt(hub)}" if hub else ""),
        )
    if "hash" in data:
        yield "requests", f"SHA-256 {data['hash']}"
    for name in ("split", "seed", "limit"):
        if run.origin.get(name) is not None:
            yield f"suites: {name}", _spelt(run.origin[name])
    for judge in settings.get("judges", ()):
        yield f"judge {called[judge['name']]}", _spelt(judge.get("settings", {}))
    for package, version in settings.get("versions", {}).items():
        yield f"version of {shown(package)}", shown(str(version))


def _spelt(value: Any) -> str:
    """A setting in a line, e.g. `seed 0, temperature 0.0`; without this machine's folders, hashes cut."""
    return shown(_plain(value), max_length=_MAX_SETTING)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = (
            f"{name} ({_plain(part)})" if isinstance(part, Mapping) else f"{name} {_plain(part)}"
            for name, part in value.items()
        )
        return ", ".join(parts) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return _HASH.sub(r"\1…", without_folder(str(value)))
