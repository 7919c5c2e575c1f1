"""`exitsafe gate`: a finished run and thresholds -> passed (0), breached (1) or could not be judged (2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, RunError

if TYPE_CHECKING:
    from exitsafe.gate import Rule
    from exitsafe.results.run import AuditRun

BREACHED = 1  # of all commands only this one ends so


def _limit(metric: str) -> object:
    return typer.Option(metavar="RATE", help=metric, show_default=False)


def gate_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", show_default=False)],
    max_asr: Annotated[float | None, _limit("Upper bound of attack success must be at most this.")] = None,
    max_toxicity: Annotated[float | None, _limit("Upper bound of toxicity must be at most this.")] = None,
    max_over_refusal: Annotated[float | None, _limit("Upper bound of over-refusal must be at most this.")] = None,
    min_vqa: Annotated[float | None, _limit("Lower bound of VQA accuracy must be at least this.")] = None,
    max_regression: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[METRIC=]RATE",
            help="Most that any metric, or this one, may be worse than in --against. Repeatable.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run that --max-regression compares with.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="LAYERS",
            help="Exits to check: all, default, or e.g. 1-8,16.",
            show_default="all audited",
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="layers|bins|categories|worst",
            help="Check each exit, each bin, each category at each exit, or the worst exit.",
            show_default="layers",
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="More limits, in YAML (docs/gate.md).", show_default=False, dir_okay=False
        ),
    ] = None,
    max_unscored: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Largest share of unscored answers; with more, a place is not judged.",
            hidden=True,
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write JUnit XML there.", show_default=False, dir_okay=False)
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md",
            help='Append the table in Markdown, e.g. to "$GITHUB_STEP_SUMMARY".',
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Check a run against thresholds: exit status 0 if all hold, 1 if one is breached, 2 if it could not be judged.

    A threshold holds only if the worse end of the 95% interval is within it, with unscored answers counted against
    the model.
    """
    with console.results(as_json=json) as show:
        from exitsafe.gate import MAX_UNSCORED, gate
        from exitsafe.results.run import load_run

        found = load_run(run)
        before = None if against is None else load_run(against)
        given, stated = _read_rules(rules)
        limits = {
            "--max-asr": ("asr", "max", max_asr),
            "--max-toxicity": ("toxicity", "max", max_toxicity),
            "--max-over-refusal": ("over_refusal", "max", max_over_refusal),
            "--min-vqa": ("vqa_accuracy", "min", min_vqa),
        }
        given = [*_flag_rules(limits), *_regression_rules(max_regression or [], before), *given]
        given = [rule.with_defaults(scope=scope, layers=layers) for rule in given]
        _check_given(given, before)
        share = next((each for each in (max_unscored, stated) if each is not None), MAX_UNSCORED)
        if not 0.0 <= share < 1.0:
            raise InputError(f"--max-unscored {share:g}: choose a share from 0 to below 1")
        result = gate(found, given, against=before, max_unscored=share)
        from exitsafe.cli.gate_files import append_summary, write_junit
        from exitsafe.cli.gate_tables import gate_table, verdict

        if junit is not None:
            write_junit(result, junit)
        if summary is not None:
            append_summary(result, summary)
        # what is not passed says so on stderr, where every failure ends
        show(result.to_dict(), lambda: [gate_table(result), *([verdict(result)] if result.outcome == "pass" else [])])
    if result.outcome == "unjudged":
        first = next(each for each in result.findings if each.outcome == "unjudged")
        # the table has all reasons
        why = f" First: {first.name}, {first.place.name}: {first.reason}; {first.fix}" if json else ""
        raise RunError(verdict(result) + why)
    if result.outcome == "breach":
        console.complain(verdict(result))
        raise typer.Exit(BREACHED)


def _read_rules(path: Path | None) -> tuple[list[Rule], float | None]:
    from exitsafe.gate import read_rules

    return ([], None) if path is None else read_rules(path)


def _flag_rules(limits: dict[str, tuple[str, str, float | None]]) -> list[Rule]:
    from exitsafe.gate.rules import make_rule

    return [
        make_rule({"metric": metric, side: limit}, where=f"{flag}: ")
        for flag, (metric, side, limit) in limits.items()
        if limit is not None
    ]


def _regression_rules(texts: list[str], before: AuditRun | None) -> list[Rule]:
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
