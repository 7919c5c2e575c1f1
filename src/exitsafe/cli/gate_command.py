"""`exitsafe gate`: a finished run and thresholds -> passed (0), breached (1) or could not be judged (2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from exitsafe.cli import console
from exitsafe.errors import InputError, RunError
from exitsafe.specs.verbs import GateSpec

if TYPE_CHECKING:
    from exitsafe.gate import Rule
    from exitsafe.results.run import AuditRun

BREACHED = 1  # of all commands only this one ends so


def gate_command(spec: GateSpec, show: console.Show) -> None:
    """Check a run against thresholds: exit status 0 if all hold, 1 if one is breached, 2 if it could not be judged.

    A threshold holds only if the worse end of the 95% interval is within it, with unscored answers counted against
    the model.
    """
    from exitsafe.gate import MAX_UNSCORED, gate
    from exitsafe.results.run import load_run

    run = load_run(spec.run)
    before = None if spec.against is None else load_run(spec.against)
    given, stated = _read_rules(spec.rules)
    given = [*_flag_rules(spec), *_regression_rules(spec.max_regression, before), *given]
    given = [rule.with_defaults(scope=spec.scope, layers=spec.layers) for rule in given]
    _check_given(given, before)
    share = next((each for each in (spec.max_unscored, stated) if each is not None), MAX_UNSCORED)
    result = gate(run, given, against=before, max_unscored=share)
    from exitsafe.cli.gate_files import append_summary, write_junit
    from exitsafe.cli.gate_tables import gate_table, verdict

    if spec.junit is not None:
        write_junit(result, spec.junit)
    if spec.summary is not None:
        append_summary(result, spec.summary)
    # what is not passed says so on stderr, where every failure ends
    show(result.to_dict(), lambda: [gate_table(result), *([verdict(result)] if result.outcome == "pass" else [])])
    if result.outcome == "unjudged":
        first = next(each for each in result.findings if each.outcome == "unjudged")
        # the table has all reasons
        why = f" First: {first.name}, {first.place.name}: {first.reason}; {first.fix}" if show.as_json else ""
        raise RunError(verdict(result) + why)
    if result.outcome == "breach":
        console.complain(verdict(result))
        raise typer.Exit(BREACHED)


def _read_rules(path: Path | None) -> tuple[list[Rule], float | None]:
    from exitsafe.gate import read_rules

    return ([], None) if path is None else read_rules(path)


def _flag_rules(spec: GateSpec) -> list[Rule]:
    from exitsafe.gate.rules import make_rule

    limits = (
        ("--max-asr", "asr", "max", spec.max_asr),
        ("--max-toxicity", "toxicity", "max", spec.max_toxicity),
        ("--max-over-refusal", "over_refusal", "max", spec.max_over_refusal),
        ("--min-vqa", "vqa_accuracy", "min", spec.min_vqa),
    )
    return [
        make_rule({"metric": metric, side: limit}, where=f"{flag}: ")
        for flag, metric, side, limit in limits
        if limit is not None
    ]


def _regression_rules(texts: Sequence[str], before: AuditRun | None) -> list[Rule]:
    """METRIC=RATE is one rule; RATE is one for every share that the other run measured and that can become worse."""
    from exitsafe.gate.rules import make_rule
    from exitsafe.results.metrics import METRICS

    if texts and before is None:
        raise InputError("--max-regression needs the run to compare with: give --against RUN")
    in_before = {name for layer in (before.summary["layers"] if before else ()) for name in layer["metrics"]}
    named: dict[str, str] = {}
    for text in texts:
        metric, _, rate = text.rpartition("=")
        if metric in named:
            raise InputError(f"--max-regression {text}: {metric or 'every share'} has a limit already; give one")
        named[metric] = rate
    if "" in named:
        shares = [each.name for each in METRICS if each.direction and each.bounds and each.name in in_before]
        named = dict.fromkeys(shares, named.pop("")) | named
    return [
        make_rule({"metric": name, "max_regression": rate}, where=f"--max-regression {rate}: ")
        for name, rate in named.items()
    ]


def _check_given(rules: list[Rule], before: AuditRun | None) -> None:
    """There is something to hold the run against, and everything given has a use."""
    has_regression = any(rule.side == "max_regression" for rule in rules)
    if has_regression and before is None:
        raise InputError("max_regression in --rules needs the run to compare with: give --against RUN")
    if before is not None and not has_regression:
        raise InputError("--against is for --max-regression: give that too, e.g. --max-regression 0.02")
    if not rules:
        raise InputError("no limit given; give e.g. --max-asr 0.05 --min-vqa 0.6, or --rules FILE.yaml")
