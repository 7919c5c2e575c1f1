"""`exitsafe judge`: a finished run and further judges -> the same run with their verdicts; nothing is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.audit_plan import judging_like, make_judges, recorded_judging, say_costs, show_results
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, RunError


def judge_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", show_default=False)],
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Who scores; may come several times.", show_default=False),
    ] = None,
    retry_unscored: Annotated[
        bool,
        typer.Option("--retry-unscored", help="Ask judges that the run has again about what they could not score."),
    ] = False,
    judge_device: options.JudgeDevice = None,
    judge_url: options.JudgeUrl = None,
    judge_rubric: options.JudgeRubric = None,
    judge_rate: options.JudgeRate = None,
    judge_prices: options.JudgePrices = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Let further judges score the answers of a finished run.

    The run's first judge keeps speaking for each metric; the new ones stand beside it. Verdicts are saved as they
    come: the same command goes on where it stopped.
    """
    with console.results(as_json=json) as show:
        if not judge:
            raise InputError("no judge is named: give --judge NAME")
        from exitsafe.results.run import load_run

        found = load_run(run)
        if not found.origin.get("suites"):
            raise RunError(
                f"{run} does not say which suites its samples are from: judge it in Python, where you have them "
                "(exitsafe.judge)"
            )
        samples = defaults.read_samples(dict(found.origin))
        judging = options.judging(
            device=judge_device, url=judge_url, rubric=judge_rubric, rate=judge_rate, prices=judge_prices
        )
        options.check_judging(judging, judges=judge)
        judging = judging_like(run, judging, judges=judge, named=judge)
        judges = make_judges(judge, judging) or []
        from exitsafe.auditing.audit import judge as judge_run

        with console.progress_bar("Judging", unit="verdict") as progress:
            judged = judge_run(
                found,
                samples,
                judges=judges,
                retry_unscored=retry_unscored,
                progress=progress,
                origin={"judging": recorded_judging(run) | judging},
            )
        say_costs(judges)
        show_results(judged, show, asked=judge)
