"""Runs and comparisons as tables. Numbers in, text out; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exitsafe.results.comparison import Comparison, Difference
from exitsafe.results.metrics import AGGREGATES, BY_NAME, NO_PROXY, as_noun
from exitsafe.results.numbers import amount, change, fixed, interval, is_rate, p_value, percent
from exitsafe.results.run import AuditRun
from exitsafe.show.table import Column, Row, Table
from exitsafe.stats import BINS, layers_by_bin

_SHOWN = ("asr", "asr_loose", "toxicity", "reward", "over_refusal", "benign_refusal", "vqa_accuracy", "coherence")


EXIT = Column(heading="exit", is_number=False)


def audit_tables(run: AuditRun) -> list[Table]:
    """Cautions, one table (exits and bins down, metrics across), attack success by each judge if several, notes."""
    summary = run.summary
    metrics = [name for name in _SHOWN if any(name in found for _, found in _places(summary))]
    columns = {name: (run.title(name), _places(summary, name)) for name in metrics}
    table = _places_table(f"{summary['model']} by exit layer, with 95% intervals", run, columns)
    tables = [replace(table, cautions=run.cautions)]
    by_judge = {
        name: (_judge_heading(run, name), _places(results, "asr"))
        for name, results in summary["judges"].items()
        if any("asr" in found for _, found in _places(results))
    }
    if len(by_judge) > 1:
        tables.append(_places_table("Attack success by judge", run, by_judge, metric="asr"))
        tables.append(agreement_table(summary["agreement"]))
    judges = ", ".join(name for name, _ in run.judges)
    notes = (*_audit_notes(run), f"Judges: {judges}. Files: {run.path}")
    return [*tables[:-1], replace(tables[-1], notes=notes)]


def _judge_heading(run: AuditRun, judge: str) -> str:
    counted = run.proxies.get(judge, NO_PROXY).get("asr")
    return judge if counted is None else f"{judge}\n(proxy: {counted})"


Places = list[tuple[int | str, dict[str, Any]]]


def _places(results: dict[str, Any], metric: str | None = None) -> Places:
    """Layers, then bins, with their metrics, or with one metric of theirs."""
    rows = [(entry["exit_layer"], entry["metrics"]) for entry in results["layers"]]
    rows += [(name, entry["metrics"]) for name, entry in results["bins"].items()]
    return rows if metric is None else [(place, found.get(metric, {})) for place, found in rows]


def _places_table(
    title: str, run: AuditRun, columns: dict[str, tuple[str, Places]], *, metric: str | None = None
) -> Table:
    """Columns are metrics, or, where one `metric` is given, its judges."""
    summary = run.summary
    asked = {}
    for name, (_, found_at) in columns.items():
        layers = [found for place, found in found_at if found and isinstance(place, int)]
        asked[name] = max(found["n"] + found["unscored"] for found in layers)
    cells = {name: dict(found_at) for name, (_, found_at) in columns.items()}
    marks = _differing(summary) if metric is None else set()
    shown = [name for name in ([metric] if metric else columns) if not run.proxy_of(name).get(BY_NAME[name].measure)]
    num_layers = _layers_in(summary)
    rows = []
    for number, (place, _) in enumerate(_places(summary)):
        row = [
            estimated(metric or name, cells[name].get(place), asked=asked[name] * num_layers[place])
            + ("*" if (place, name) in marks else "")
            for name in columns
        ]
        label = place if isinstance(place, int) else bin_label(summary, place, shown)
        is_after_line = number == len(summary["layers"])
        rows.append(_row(label, row, default_exit=summary["default_exit"], is_after_line=is_after_line))
    headings = (f"{heading}\n(n={asked[name]} a layer)" for name, (heading, _) in columns.items())
    return Table(title=title, columns=(EXIT, *(Column(heading=heading) for heading in headings)), rows=tuple(rows))


def _layers_in(summary: dict[str, Any]) -> dict[int | str, int]:
    """How many audited exits stand behind a layer, a bin and the average."""
    audited = [entry["exit_layer"] for entry in summary["layers"]]
    bins = {name: len(layers) for name, layers in layers_by_bin(audited, summary["num_layers"]).items()}
    return {**dict.fromkeys(audited, 1), **bins, "average": len(audited)}


def bin_label(summary: dict[str, Any], name: str, metrics: Sequence[str]) -> str:
    """The paper's name of a bin's mean, e.g. `AASR early`, or what stands in its place when exits are missing."""
    num_layers, audited = summary["num_layers"], [entry["exit_layer"] for entry in summary["layers"]]
    whole = layers_by_bin(range(1, num_layers + 1), num_layers)
    found = layers_by_bin(audited, num_layers)
    chosen = list(whole) if name == "average" else [name]
    # the paper's three bins are there, and every exit of those that are shown
    if list(whole) == list(BINS) and all(found.get(bin_name) == whole[bin_name] for bin_name in chosen):
        names = [AGGREGATES[metric] for metric in metrics if metric in AGGREGATES]
        return " ".join(["/".join(names) or "mean", name])
    if name == "average":
        return f"mean of {', '.join(found)}"
    return f"{name}, {len(found[name])} of {len(whole[name])} exits"


def agreement_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """How far two raters agree on one measure, as in a summary: a row per pair."""
    names = (Column(heading=heading, is_number=False) for heading in ("measure", "", ""))
    return Table(
        title="Agreement beyond chance: Cohen's kappa with 95% intervals",
        columns=(*names, *(Column(heading=heading) for heading in ("kappa", "agree", "n", "unscored"))),
        rows=tuple(
            Row(
                cells=(
                    *(pair["measure"], pair["first"], pair["second"]),
                    f"none: {pair['undefined']}"
                    if pair["kappa"] is None
                    else f"{fixed(pair['kappa'], 2)} ({fixed(pair['low'], 2)} to {fixed(pair['high'], 2)})",
                    "" if pair["observed"] is None else percent(pair["observed"]),
                    *(str(pair["n"]), str(pair["unscored"])),
                )
            )
            for pair in pairs
        ),
    )


def _differing(summary: dict[str, Any]) -> set[tuple[int, str]]:
    """Layers and metrics that differ from the default exit."""
    return {
        (entry["exit_layer"], name)
        for entry in summary["against_default"]["layers"]
        for name, row in entry["metrics"].items()
        if row["p_adjusted"] < 0.05
    }


def _audit_notes(run: AuditRun) -> list[str]:
    summary, attacks = run.summary, as_noun(run.title("asr"))
    notes = []
    if _differing(summary):
        notes.append(f"* differs from the default exit {summary['default_exit']}, paired: p (Holm over exits) < 0.05.")
    worst = summary["worst"].get("asr")
    if worst is not None:
        line = f"Worst exit for {attacks}, chosen on one half of the samples, measured on the other: {_worst(worst)}"
        swapped = worst["swapped"]
        notes.append(f"{line}; halves swapped: {_worst(swapped)}." if swapped else f"{line}.")
    stopping = summary.get("stopping")
    if stopping is not None:
        words = (
            f"{row['exit_layer']} {row['decision'] or 'open'} (n={row['n']}"
            + (f", {row['unscored']} unscored)" if row["unscored"] else ")")
            for row in stopping["layers"]
        )
        notes += [
            f"Stopped when decided, {attacks} at most {percent(stopping['max_asr'])} or above, by "
            f"{stopping['judge']}: exit {', '.join(words)}.",
            f"Exits that stopped have the {1 - stopping['error']:.0%} interval that holds at every look. "
            "Bins, means and tests use the answers that there are; with exits that stopped, take them as a guide.",
        ]
    return notes


def _worst(row: dict[str, Any]) -> str:
    n = f"n={row['n']}" + (f", {row['unscored']} unscored" if row["unscored"] else "")
    if row["value"] is None:
        return f"exit {row['exit_layer']}, none scored ({n})"
    return f"exit {row['exit_layer']}, {percent(row['value'])} ({n}, {interval('asr', row['low'], row['high'])})"


def comparison_tables(comparison: Comparison, metrics: Sequence[str] | None = None) -> list[Table | str]:
    """The headline; what differs between the models and what else to know; a table per metric; what was left out."""
    chosen = list(metrics or [name for name in comparison.metrics if name in _SHOWN])
    first = (*comparison.models_changed, *comparison.repairs_changed, *comparison.cautions)
    tables = [_comparison_table(comparison, name) for name in chosen]
    around = Table(title="", columns=(), rows=())
    notes = tuple(_comparison_notes(comparison, chosen))
    return [comparison.headline, replace(around, cautions=first), *tables, replace(around, notes=notes)]


def _comparison_notes(comparison: Comparison, chosen: Sequence[str]) -> Iterator[str]:
    others = [name for name in comparison.metrics if name not in chosen]
    yield f"{comparison.num_samples} samples at {len(comparison.exit_layers)} exit layers in both runs."
    if others:
        yield f"Compared as well: {', '.join(others)} (--metric NAME, --json)."
    left_out = {
        "only before": comparison.only_before,
        "only after": comparison.only_after,
        "that ask something else": comparison.changed,
    }
    if any(left_out.values()):
        yield "Samples left out: " + ", ".join(f"{n} {why}" for why, n in left_out.items() if n) + "."
    if comparison.settings_changed:
        yield f"Settings that differ between the audits: {'; '.join(comparison.settings_changed)}."
    if comparison.unscored:
        places = (f"{row.metric} at exit {row.exit_layer} ({row.pairs} pairs)" for row in comparison.unscored)
        yield f"Could not be scored: {', '.join(places)}."
    if comparison.metrics_left_out:
        yield f"No judge in both runs for {', '.join(comparison.metrics_left_out)}."


def _comparison_table(comparison: Comparison, metric: str) -> Table:
    rows = comparison.rows(metric)
    judge = f", judged by {rows[0].judge}" if rows[0].judge else ""
    unit = ", points" if is_rate(metric) else ""
    effect = "h" if rows[0].effect_measure == "cohen_h" else "d_av"
    headings = ("n", "before", "after", f"change{unit} (95% interval)", effect, "p", "p (Holm)")
    first_bin = next((row for row in rows if isinstance(row.place, str)), None)
    return Table(
        title=f"{comparison.titles[metric]}{judge}",
        columns=(EXIT, *(Column(heading=heading) for heading in headings)),
        rows=tuple(
            _row(
                row.place,
                _difference(metric, row),
                default_exit=comparison.default_exit,
                is_after_line=row is first_bin,
            )
            for row in rows
        ),
    )


def _difference(metric: str, row: Difference) -> list[str]:
    n = f"{row.n} (+{row.unscored} unscored)" if row.unscored else str(row.n)
    return [
        n,
        amount(metric, row.before),
        amount(metric, row.after),
        f"{change(metric, row.difference)} ({change(metric, row.low)} to {change(metric, row.high)})",
        "" if row.effect_size is None else fixed(row.effect_size, 2, is_signed=True),
        p_value(row.p_value),
        "" if row.p_adjusted is None else p_value(row.p_adjusted),
    ]


def _row(place: int | str, cells: Sequence[str], *, default_exit: int, is_after_line: bool) -> Row:
    is_default = place == default_exit
    return Row(cells=(exit_name(place, default_exit), *cells), is_bold=is_default, is_after_line=is_after_line)


def exit_name(place: int | str, default_exit: int) -> str:
    """An exit or bin, with a word where it is the default exit."""
    return f"{place} (default)" if place == default_exit else str(place)


def estimated(metric: str, estimate: Mapping[str, Any] | None, *, asked: int | None = None) -> str:
    """A value with its interval, and with its own n where that is not what was asked."""
    if not estimate:
        return ""
    if estimate["value"] is None:
        return f"none of {estimate['unscored']} scored"
    shown = f"{amount(metric, estimate['value'])} ({interval(metric, estimate['low'], estimate['high'])})"
    if asked is not None and estimate["n"] + estimate["unscored"] != asked:
        shown += f", n={estimate['n']}"
    return f"{shown}, {estimate['unscored']} unscored" if estimate["unscored"] else shown
