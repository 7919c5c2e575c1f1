"""The tables of runs and comparisons, built once for terminal, page and Markdown. Runs in, rows of text out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exitsafe.results.comparison import LEVEL, NOT_SHOWN, Comparison, Difference, against_default
from exitsafe.results.metrics import AGGREGATES, BY_NAME, METRICS, as_noun
from exitsafe.results.numbers import (
    amount,
    brief_estimate,
    change,
    estimate,
    exits_named,
    fixed,
    is_rate,
    listed,
    number_list,
    p_value,
    percent,
)
from exitsafe.results.run import AuditRun, WorstExit
from exitsafe.show.names import judge_names, shown, without_folder
from exitsafe.show.table import Column, Row, Table
from exitsafe.stats import BINS, Estimate, bootstrap_p_value, layers_by_bin
from exitsafe.stats.bootstrap import RESAMPLES

LabelledRun = tuple[str, AuditRun]
"""A run with its name on the page."""

COSTS = ("over_refusal", "benign_refusal", "vqa_accuracy")
"""What a repair may make worse."""
EXIT = Column(heading="exit", is_number=False)
_PRINTED = ("asr", "asr_loose", "toxicity", "reward", "over_refusal", "benign_refusal", "vqa_accuracy", "coherence")
_NEARLY = 1.5  # a resample without the metric moves the smallest p a little; the next one is twice as large
_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{16,}\b")
_MAX_SETTING = 400


# ---- one run, exit by exit ----


@dataclass(frozen=True, kw_only=True)
class Series:
    """A column of a table by exit.

    Args:
        heading: What it holds.
        run: Whose numbers.
        metric: What they measure.
        estimates: By exit layer and bin.
        aggregate: The paper's name of the mean over a bin, if it has one.
        marked: Exits that differ from the default one.
    """

    heading: str
    run: AuditRun
    metric: str
    estimates: Mapping[int | str, Estimate]
    aggregate: str | None = None
    marked: frozenset[int | str] = frozenset()

    @property
    def asked(self) -> int:
        """Answers at an exit, scored or not."""
        return max((e.n + e.unscored for place, e in self.estimates.items() if isinstance(place, int)), default=0)


def series_of(heading: str, run: AuditRun, metric: str, judge: str | None = None) -> Series:
    """A metric by the judge that reports it, or by another."""
    is_proxy = BY_NAME[metric].measure in run.proxy_of(metric, judge)
    aggregate = None if is_proxy else AGGREGATES.get(metric)
    return Series(heading=heading, run=run, metric=metric, estimates=run.estimates(metric, judge), aggregate=aggregate)


def exit_table(title: str, columns: Sequence[Series]) -> Table:
    """Exits and bins down, metrics, runs or judges across; each cell with its interval, and its n if that differs."""
    default_exit = columns[0].run.default_exit
    exits = sorted({layer for each in columns for layer in each.run.exit_layers})
    bins = [name for name in (*BINS, "average") if any(name in each.estimates for each in columns)]
    num_exits = [_num_exits(each.run) for each in columns]
    rows = []
    places: list[int | str] = [*exits, *bins]
    for place in places:
        cells = [
            brief_estimate(each.metric, each.estimates.get(place), asked=each.asked * counts.get(place, 1))
            + "*" * (place in each.marked)
            for each, counts in zip(columns, num_exits, strict=True)
        ]
        name = exit_name(place, default_exit) if isinstance(place, int) else _bin_name(place, columns)
        rows.append(Row(cells=(name, *cells), is_bold=place == default_exit, is_after_line=place in bins[:1]))
    headings = (Column(heading=f"{each.heading}\n(n={each.asked:,} per exit)") for each in columns)
    return Table(title=f"{title}, with 95% intervals", columns=(EXIT, *headings), rows=tuple(rows))


def exit_name(place: int | str, default_exit: int) -> str:
    """An exit or bin, with a word where it is the default exit, or unknown (0)."""
    if place == 0:
        return "as served"
    return f"{place} (default)" if place == default_exit else str(place)


def bin_label(run: AuditRun, name: str, aggregates: Sequence[str]) -> str:
    """The paper's name of a bin's mean, e.g. `AASR early`, or what stands in its place when exits are missing."""
    whole = layers_by_bin(range(1, run.num_layers + 1), run.num_layers)
    found = layers_by_bin(run.exit_layers, run.num_layers)
    chosen = list(whole) if name == "average" else [name]
    # the paper's three bins are there, and every exit of those that are shown
    if list(whole) == list(BINS) and all(found.get(bin_name) == whole[bin_name] for bin_name in chosen):
        return " ".join(["/".join(aggregates) or "mean", name])
    if name == "average":
        return f"mean of {', '.join(found)}"
    return f"{name}, {len(found[name])} of {len(whole[name])} exits"


def _bin_name(name: str, columns: Sequence[Series]) -> str:
    own = [each for each in columns if name in each.estimates]
    aggregates = list(dict.fromkeys(each.aggregate for each in own if each.aggregate))
    return " / ".join(dict.fromkeys(bin_label(each.run, name, aggregates) for each in own))


def _num_exits(run: AuditRun) -> dict[int | str, int]:
    """How many audited exits stand behind a bin and the average."""
    bins = layers_by_bin(run.exit_layers, run.num_layers)
    return {**{name: len(layers) for name, layers in bins.items()}, "average": len(run.exit_layers)}


def audit_tables(run: AuditRun) -> list[Table]:
    """Cautions, one table of all metrics, attack success by each judge if several, notes."""
    differing = {
        metric: frozenset(row.place for row in rows if row.outcome != NOT_SHOWN)
        for metric, rows in against_default(run).items()
    }
    columns = [
        replace(series_of(run.title(metric), run, metric), marked=differing.get(metric, frozenset()))
        for metric in _PRINTED
        if run.estimates(metric)
    ]
    tables = [replace(exit_table(f"{run.summary['model']} by exit layer", columns), cautions=run.cautions)]
    by_judge = [
        series_of(_judge_heading(run, judge), run, "asr", judge)
        for judge in run.summary["judges"]
        if run.estimates("asr", judge)
    ]
    if len(by_judge) > 1:
        tables.append(exit_table("Attack success by judge", by_judge))
        tables.append(agreement_table(run.summary["agreement"]))
    judges = ", ".join(name for name, _ in run.judges)
    notes = (*_audit_notes(run, has_marks=any(differing.values())), f"Judges: {judges}. Files: {run.path}")
    return [*tables[:-1], replace(tables[-1], notes=notes)]


def _judge_heading(run: AuditRun, judge: str) -> str:
    counted = run.proxy_of("asr", judge).get("asr")
    return judge if counted is None else f"{judge}\n(proxy: {counted})"


def _audit_notes(run: AuditRun, *, has_marks: bool) -> Iterator[str]:
    if has_marks:
        yield f"* differs from the default exit, {run.default_exit}: paired test, p (Holm over exits) < {LEVEL}."
    if run.worst("asr"):
        attacks = as_noun(run.title("asr"))
        yield f"Worst exit for {attacks}, chosen on one half of the samples, measured on the other: {worst_note(run)}."
    yield from stopping_notes(run)


def worst_note(run: AuditRun) -> str:
    """The worst exit for attack success with its rate, chosen on either half and measured on the other."""
    worst = run.worst("asr")
    assert worst is not None
    if worst.swapped is None:
        return _worst_exit(run, worst)
    is_same = worst.swapped.exit_layer == worst.exit_layer
    doubt = "" if is_same else ", so it is uncertain which exit is the worst"
    return f"{_worst_exit(run, worst)}; with the halves swapped, {_worst_exit(run, worst.swapped)}{doubt}"


def _worst_exit(run: AuditRun, found: WorstExit) -> str:
    return f"exit {found.exit_layer}, {estimate('asr', found, level=interval_level(run, found.exit_layer))}"


def interval_level(run: AuditRun, exit_layer: int) -> str:
    """Of attack success: 95%, or, if the exit stopped early, the level that holds whenever it stops."""
    stopping = run.summary.get("stopping", {"layers": []})
    has_stopped = any(row["exit_layer"] == exit_layer and row["decision"] is not None for row in stopping["layers"])
    return f"{100 * (1 - stopping['error']):.3g}%" if has_stopped else "95%"


def stopping_notes(run: AuditRun) -> Iterator[str]:
    """Which exits stopped early on which side of the limit, and what that means for the numbers."""
    stopping = run.summary.get("stopping")
    if stopping is None:
        return
    by_decision: dict[str | None, list[int]] = {}
    for row in stopping["layers"]:
        by_decision.setdefault(row["decision"], []).append(row["exit_layer"])
    limit, attacks = percent(stopping["max_asr"]), as_noun(run.title("asr", stopping["judge"]))
    words = {"below": f"at most {limit}", "above": f"above {limit}", None: "undecided"}
    parts = [f"{exits_named(by_decision[key])} {text}" for key, text in words.items() if key in by_decision]
    yield (
        f"An exit stopped as soon as it was clear whether {attacks} there is at most {limit} (error level "
        f"{stopping['error']:.0%}, by {shown(without_folder(stopping['judge']))}): {'; '.join(parts)}."
    )
    yield (
        f"Exits that stopped rest on fewer answers; {attacks} there has the {1 - stopping['error']:.0%} interval that "
        "allows for stopping. Treat means over exits and tests that include them as a guide only."
    )


def agreement_table(pairs: Sequence[Mapping[str, Any]], title: str = "Agreement beyond chance") -> Table:
    """How far two raters agree on one measure, as in a summary: a row per pair."""
    names = (Column(heading=heading, is_number=False) for heading in ("measure", "first", "second"))
    return Table(
        title=f"{title}: Cohen's kappa with 95% intervals",
        columns=(*names, *(Column(heading=heading) for heading in ("kappa", "agree", "n", "unscored"))),
        rows=tuple(
            Row(
                cells=(
                    *(pair["measure"], pair["first"], pair["second"]),
                    f"none: {pair['undefined']}"
                    if pair["kappa"] is None
                    else f"{fixed(pair['kappa'], 2)} ({fixed(pair['low'], 2)} to {fixed(pair['high'], 2)})",
                    "" if pair["observed"] is None else percent(pair["observed"]),
                    *(f"{pair['n']:,}", f"{pair['unscored']:,}"),
                )
            )
            for pair in pairs
        ),
    )


def judges_tables(runs: Sequence[LabelledRun]) -> list[Table]:
    """How far the judges of each run agree, with the names that a page may show."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    tables = []
    for label, run in runs:
        pairs = [
            {
                **pair,
                "measure": " / ".join(dict.fromkeys(run.title(pair["measure"], pair[n]) for n in ("first", "second"))),
                **{n: called[pair[n]] for n in ("first", "second")},
            }
            for pair in run.summary["agreement"]
        ]
        if pairs:
            tables.append(agreement_table(pairs, f"{label}: agreement beyond chance"))
    return tables


# ---- differences ----


def default_tables(run: AuditRun) -> list[Table]:
    """Every other exit of a run against its default one, a table per metric."""
    found = against_default(run)
    return [
        _difference_table(run.title(metric), rows, "at default", "at exit", run, differ="differ from the default exit")
        for metric in (each.name for each in METRICS)
        if (rows := found.get(metric))
    ]


def comparison_tables(
    comparison: Comparison, metrics: Sequence[str] | None = None, *, before: str = "before", after: str = "after"
) -> list[Table]:
    """The tests per exit and bin, a table per metric.

    Args:
        comparison: Two runs.
        metrics: Which; all by default.
        before, after: What the runs are called.
    """
    tables = []
    for metric in comparison.metrics if metrics is None else metrics:
        rows = comparison.rows(metric)
        judge = f", judged by {shown(without_folder(rows[0].judge))}" if rows[0].judge else ""
        tables.append(_difference_table(f"{comparison.titles[metric]}{judge}", rows, before, after, comparison))
    return tables


def _difference_table(
    title: str,
    rows: Sequence[Difference],
    before: str,
    after: str,
    of: AuditRun | Comparison,
    *,
    differ: str = "differ",
) -> Table:
    """A row per exit and bin; the title says how many exits differ."""
    at_exits = [row for row in rows if isinstance(row.place, int)]
    num_apart = sum(row.outcome != NOT_SHOWN for row in at_exits)
    num_clusters = max((row.n for row in at_exits), default=1)
    unit = " (points)" if is_rate(rows[0].metric) else ""
    effect = "Cohen's h" if rows[0].effect_measure == "cohen_h" else "d_av"
    headings = ("n", before, after, f"change{unit}, 95% interval", effect, "p", "p (Holm)")
    first_bin = next((row for row in rows if row.p_adjusted is None), None)
    return Table(
        title=f"{title}: {num_apart} of {len(at_exits)} exits {differ}",
        columns=(
            EXIT,
            *(Column(heading=heading) for heading in headings),
            Column(heading=f"{after} is", is_number=False),
        ),
        rows=tuple(
            Row(
                cells=(exit_name(row.place, of.default_exit), *_difference(row, num_clusters), row.outcome),
                is_bold=row.place == of.default_exit,
                is_after_line=row is first_bin,
            )
            for row in rows
        ),
    )


def _difference(row: Difference, num_clusters: int) -> tuple[str, ...]:
    """p is marked where as many resamples cannot show less."""
    least = bootstrap_p_value(np.ones(RESAMPLES), num_clusters=num_clusters)
    is_least = row.test == "bootstrap" and row.p_value < _NEARLY * least
    return (
        f"{row.n:,} (+{row.unscored:,} unscored)" if row.unscored else f"{row.n:,}",
        amount(row.metric, row.before),
        amount(row.metric, row.after),
        f"{change(row.metric, row.difference)} ({change(row.metric, row.low)} to {change(row.metric, row.high)})",
        "" if row.effect_size is None else fixed(row.effect_size, 2, is_signed=True),
        p_value(row.p_value, is_least=is_least),
        "" if row.p_adjusted is None else p_value(row.p_adjusted, is_least=is_least),
    )


def comparison_screen(comparison: Comparison, metrics: Sequence[str] | None = None) -> list[Table | str]:
    """The headline; what differs between the models and what else to know; tables; what was left out."""
    chosen = list(metrics or [name for name in comparison.metrics if name in _PRINTED])
    first = (*comparison.models_changed, *comparison.repairs_changed, *comparison.cautions)
    around = Table(title="", columns=(), rows=())
    return [
        comparison.headline,
        replace(around, cautions=first),
        *comparison_tables(comparison, chosen),
        replace(around, notes=tuple(_comparison_notes(comparison, chosen))),
    ]


def _comparison_notes(comparison: Comparison, chosen: Sequence[str]) -> Iterator[str]:
    others = [name for name in comparison.metrics if name not in chosen]
    yield pairing_note(comparison)
    if others:
        yield f"Also compared: {', '.join(others)} (--metric NAME, --json)."
    if comparison.settings_changed:
        yield f"Settings that differ between the audits: {'; '.join(comparison.settings_changed)}."
    if comparison.unscored:
        places = (f"{row.metric} at exit {row.exit_layer} ({row.pairs} pairs)" for row in comparison.unscored)
        yield f"Could not be scored: {', '.join(places)}."
    if comparison.metrics_left_out:
        yield f"No judge in both runs for {', '.join(comparison.metrics_left_out)}."


def pairing_note(comparison: Comparison) -> str:
    """What was compared, and what was left out."""
    num_samples, num_exits = comparison.num_samples, len(comparison.exit_layers)
    left = {
        "in the first run only": comparison.only_before,
        "in the second run only": comparison.only_after,
        "whose content differs": comparison.changed,
    }
    out = [f"{n:,} {why}" for why, n in left.items() if n]
    return (
        f"Compared on the same {num_samples:,} request{'s' * (num_samples != 1)} at {num_exits} "
        f"exit{'s' * (num_exits != 1)}.{f' Left out: {listed(out)}.' if out else ''}"
    )


# ---- how a run was made ----


def method_table(runs: Sequence[LabelledRun]) -> Table:
    """What decides a run's answers and verdicts, a column per run."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    facts = [dict(_facts(run, called)) for _, run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    return Table(
        title="What was audited and how",
        columns=tuple(Column(heading=each, is_number=False) for each in ("setting", *(label for label, _ in runs))),
        rows=tuple(Row(cells=(name, *(found.get(name, "") for found in facts))) for name in names),
    )


def _facts(run: AuditRun, called: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    settings, summary = run.settings, run.summary
    model = settings.get("model", {})
    yield "model", shown(without_folder(str(summary["model"])))
    if run.is_served:
        yield "server", _spelt(model.get("server", {}))
        yield "exit", "as served" if run.exit_layers == (0,) else f"{run.exit_layers[0]}, as claimed"
    else:
        yield "family, blocks, default exit", f"{summary['family']}, {run.num_layers}, {run.default_exit}"
        yield "exits audited", number_list(run.exit_layers)
    if "engine" in settings:
        yield "engine", _spelt(settings["engine"])
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
        name = shown(without_folder(suite)) or "unnamed"
        yield f"suite {name}", f"{n:,} requests" + (f", {_spelt(hub)}" if hub else "")
    if "hash" in data:
        yield "requests", f"SHA-256 {data['hash']}"
    for name in ("split", "seed", "limit"):
        if run.origin.get(name) is not None:
            yield f"suites: {name}", _spelt(run.origin[name])
    for judge in settings.get("judges", ()):
        yield f"judge {called[judge['name']]}", _spelt(judge.get("settings", {}))
    for package, version in settings.get("versions", {}).items():
        yield f"version of {shown(package)}", shown(str(version))


def _spelt(value: object) -> str:
    """A setting in a line, e.g. `seed 0, temperature 0.0`; without this machine's folders, hashes cut."""
    return shown(_plain(value), max_length=_MAX_SETTING)


def _plain(value: object) -> str:
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
