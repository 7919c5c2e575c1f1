"""Runs and comparisons as rich tables. Numbers in, renderables out; prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from exitsafe.comparison import Comparison, Difference
from exitsafe.runs import AuditRun

TITLES = {
    "asr": "Attack success",
    "asr_loose": "Attack success, loose",
    "toxicity": "Toxicity",
    "reward": "Reward",
    "refusal": "Refusal",
    "over_refusal": "Over-refusal",
    "benign_refusal": "Benign refusal",
    "vqa_accuracy": "VQA accuracy",
    "coherence": "Coherence",
    "tokens": "Tokens",
    "seconds": "Seconds",
}
_ON_A_SCALE_OF_THEIR_OWN = ("reward", "tokens", "seconds", "toxicity")
_SHOWN = ("asr", "asr_loose", "toxicity", "reward", "over_refusal", "benign_refusal", "vqa_accuracy", "coherence")


def audit_tables(run: AuditRun) -> list[Any]:
    """One table: exit layers and bins down, metrics across."""
    summary = run.summary
    rows = [(entry["exit_layer"], entry["metrics"]) for entry in summary["layers"]]
    rows += [(name, entry["metrics"]) for name, entry in summary["bins"].items()]
    metrics = [name for name in _SHOWN if any(name in found for _, found in rows)]
    table = Table(title=f"{summary['model']} by exit layer, with 95% intervals", title_justify="left")
    table.add_column("exit")
    for name in metrics:
        table.add_column(_heading(name, next(found[name] for _, found in rows if name in found)), justify="right")
    for number, (place, found) in enumerate(rows):
        starts_bins = number == len(summary["layers"])
        if starts_bins:
            table.add_section()
        cells = [_estimate(name, found.get(name)) for name in metrics]
        table.add_row(*_row(place, cells, default_exit=summary["default_exit"]))
    judges = ", ".join(name for name, _ in run.judges)
    return [table, Text(f"Judges: {judges}. Files: {run.path}", style="dim")]


def comparison_tables(comparison: Comparison, metrics: Sequence[str] | None = None) -> list[Any]:
    """A table per metric, and what was left out."""
    chosen = list(metrics or [name for name in comparison.metrics if name in _SHOWN])
    tables: list[Any] = [_comparison_table(comparison, name) for name in chosen]
    others = [name for name in comparison.metrics if name not in chosen]
    notes = [f"{comparison.num_samples} samples at {len(comparison.exit_layers)} exit layers in both runs."]
    if others:
        notes.append(f"Compared as well: {', '.join(others)} (--metric NAME, --json).")
    left_out = {
        "only before": comparison.only_before,
        "only after": comparison.only_after,
        "asked otherwise": comparison.changed,
    }
    if any(left_out.values()):
        notes.append("Samples left out: " + ", ".join(f"{n} {why}" for why, n in left_out.items() if n) + ".")
    if comparison.settings_changed:
        notes.append(f"Set otherwise in the two audits: {'; '.join(comparison.settings_changed)}.")
    if comparison.unscored:
        places = (f"{row.metric} at exit {row.exit_layer} ({row.pairs} pairs)" for row in comparison.unscored)
        notes.append(f"Could not be scored: {', '.join(places)}.")
    if comparison.metrics_left_out:
        notes.append(f"No judge in both runs for {', '.join(comparison.metrics_left_out)}.")
    return [*tables, Group(*(Text(line, style="dim") for line in notes))]


def percent(value: float) -> str:
    """A share for people, e.g. `12.5%`."""
    return f"{value:.1%}"


def _comparison_table(comparison: Comparison, metric: str) -> Table:
    rows = comparison.rows(metric)
    judge = f", judged by {rows[0].judge}" if rows[0].judge else ""
    table = Table(title=f"{TITLES.get(metric, metric)}{judge}", title_justify="left")
    unit = "" if metric in _ON_A_SCALE_OF_THEIR_OWN else ", points"
    for heading in ("exit", "n", "before", "after", f"change{unit} (95% interval)", "p", "p (Holm)"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    has_section = False
    for row in rows:
        if isinstance(row.place, str) and not has_section:
            table.add_section()
            has_section = True
        table.add_row(*_row(row.place, _difference(metric, row), default_exit=comparison.default_exit))
    return table


def _difference(metric: str, row: Difference) -> list[str]:
    number = _signed(metric)
    n = f"{row.n} (+{row.unscored} unscored)" if row.unscored else str(row.n)
    return [
        n,
        _plain(metric, row.before),
        _plain(metric, row.after),
        f"{number(row.difference)} ({number(row.low)} to {number(row.high)})",
        _p_value(row.p_value),
        "" if row.p_adjusted is None else _p_value(row.p_adjusted),
    ]


def _row(place: int | str, cells: Sequence[str], *, default_exit: int) -> list[Text]:
    is_default = place == default_exit
    name = f"{place} (default)" if is_default else str(place)
    return [Text(text, style="bold" if is_default else "") for text in (name, *cells)]


def _heading(metric: str, first: dict[str, Any]) -> str:
    return f"{TITLES.get(metric, metric)}\n(n={first['n'] + first['unscored']} a layer)"


def _estimate(metric: str, estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    if estimate["value"] is None:
        return f"none of {estimate['unscored']} scored"
    shown = (
        f"{_plain(metric, estimate['value'])} ({_bound(metric, estimate['low'])} to {_bound(metric, estimate['high'])})"
    )
    return f"{shown}, {estimate['unscored']} unscored" if estimate["unscored"] else shown


def _plain(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric in _ON_A_SCALE_OF_THEIR_OWN else percent(value)


def _bound(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric in _ON_A_SCALE_OF_THEIR_OWN else f"{100 * value:.0f}"


def _signed(metric: str) -> Any:
    """Changes of shares are in percentage points."""
    if metric in _ON_A_SCALE_OF_THEIR_OWN:
        return lambda value: f"{value:+.2f}"
    return lambda value: f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
