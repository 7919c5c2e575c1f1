"""`exitsafe judge`: a finished run and further judges -> the same run with their verdicts; nothing is generated."""

from __future__ import annotations

from exitsafe.cli import console
from exitsafe.cli.audit_command import say_costs, show_results
from exitsafe.errors import InputError, RunError
from exitsafe.specs.verbs import JudgeSpec


def judge_command(spec: JudgeSpec, show: console.Show) -> None:
    """Score the answers of a finished run with additional judges.

    Each metric is still reported by the run's first judge of it; the new ones are listed next to it. Verdicts are saved
    as they come; rerun the same command to resume.
    """
    if not spec.judges:
        raise InputError("no judge is named: give --judge NAME")
    from exitsafe.auditing.judging import available_judges
    from exitsafe.auditing.reach import judging_like, recorded_judging
    from exitsafe.data.source import source_of
    from exitsafe.judges.registry import check_options
    from exitsafe.results.run import load_run

    run = load_run(spec.run)
    if not run.origin.get("suites"):
        raise RunError(
            f"{spec.run} does not say which suites its samples are from: call exitsafe.judge in Python and pass "
            "the samples"
        )
    samples = source_of(run.origin).read()
    check_options(spec.judging, spec.judges)
    judging = judging_like(spec.run, spec.judging, judges=spec.judges, named=spec.judges)
    judges = available_judges(spec.judges, judging)
    from exitsafe.auditing.audit import judge

    given = judging.model_dump(mode="json", exclude_unset=True)
    with console.progress_bar("Judging", unit="verdict") as progress:
        judged = judge(
            run,
            samples,
            judges=judges,
            retry_unscored=spec.retry_unscored,
            progress=progress,
            origin={"judging": recorded_judging(spec.run) | given},
        )
    say_costs(judges)
    show_results(judged, show, asked=spec.judges)
