"""`exitsafe rerun`: a finished run -> the same audit once more, and whether it gives the same table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, options
from exitsafe.cli.audit_plan import AuditPlan, audit_as_planned, judging_like, make_judges, settings_of
from exitsafe.cli.run_model import load_model_of, loading_of, origin_of_model, read_samples_of, remote_code_named
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, RunError

if TYPE_CHECKING:
    from exitsafe.runs import AuditRun

_MOST_SHOWN = 5


def rerun_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The new run's folder.", show_default="RUN-again", file_okay=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:N.", show_default="as then")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    judge_url: options.JudgeUrl = None,
    judge_rubric: options.JudgeRubric = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Repeat an audit from what its run.json says, and compare the two tables.

    Exit status 0 if every metric is the same, 2 if not.
    """
    with console.results(as_json=json) as show:
        from exitsafe.runs import load_run

        before = load_run(run)
        before.responses()  # what cannot be compared says so now, not after the audit
        out = out or run.with_name(f"{run.name}-again")
        if out.resolve() == run.resolve():
            raise InputError(f"{out} is the run that is to be repeated; choose another folder for --out")
        if (out / "summary.json").is_file():
            console.note(f"{out} is finished already and is compared as it is; remove it to repeat the audit once more")
        judging = options.judging(url=judge_url, rubric=judge_rubric)
        again = _repeat(before, out=out, device=device, trust_remote_code=trust_remote_code, judging=judging)
        found = compare_runs(before, again)
        show({"run": str(before.path), "again": str(again.path), **found}, lambda: _words(found, again))
        if found["metrics_changed"]:
            raise RunError(
                f"{again.path} does not repeat {before.path}: {len(found['metrics_changed'])} metrics differ"
            )


def compare_runs(before: AuditRun, again: AuditRun) -> dict[str, Any]:
    """What two runs of the same audit share; times aside, they may share everything."""
    from exitsafe.runs.fingerprint import differences

    texts = [{(r.sample_id, r.exit_layer): r.text for r in run.responses()} for run in (before, again)]
    same = sum(texts[1].get(row) == text for row, text in texts[0].items())
    settings = differences(_judges_by_name(before.settings), _judges_by_name(again.settings))
    return {
        "answers": len(texts[0]),
        "answers_same": same,
        "metrics_changed": [
            line for line in differences(_metrics(before.summary), _metrics(again.summary)) if ".seconds." not in line
        ],
        "settings_changed": settings,
    }


def _repeat(
    before: AuditRun, *, out: Path, device: str | None, trust_remote_code: bool, judging: Mapping[str, Any]
) -> AuditRun:
    """The same audit in another folder; what is not the same model or data is refused before it is asked."""
    origin = origin_of_model(before)
    settings = settings_of(before.path, needs_suites=True)
    options.check_judging(judging, judges=settings["judges"])
    samples = read_samples_of(before)
    plan = AuditPlan(
        model=origin["model"],
        origin=origin,
        exit_layers=before.exit_layers,
        judges=tuple(settings["judges"]),
        judging=judging_like(before.path, judging, judges=settings["judges"]),
        settings={
            name: settings[name]
            for name in (*before.settings["decoding"], "skip_global", "batch_size", "stop_when", "judge_pass")
        },
        today=settings["today"],
    )
    judges = make_judges(plan.judges, plan.judging)
    loading = loading_of(before, device=device, trust_remote_code=trust_remote_code)
    with remote_code_named(before, loading):
        vlm = load_model_of(before, loading)
    return audit_as_planned(plan, vlm, samples, judges, out=out, loading=loading, title="Audit again")


def _metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's numbers under readable names, then each judge's own."""
    layers = {f"exit {entry['exit_layer']}": entry["metrics"] for entry in summary["layers"]}
    bins = {name: entry["metrics"] for name, entry in summary["bins"].items()}
    return layers | bins | {name: _metrics(results) for name, results in summary.get("judges", {}).items()}


def _judges_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "judges": {judge["name"]: judge for judge in settings["judges"]}}


def _words(found: Mapping[str, Any], again: AuditRun) -> list[str]:
    lines = [f"{found['answers_same']} of {found['answers']} answers are the same. Files: {again.path}"]
    if found["settings_changed"]:
        lines.append(f"Otherwise than then: {'; '.join(found['settings_changed'])}.")
    changed = found["metrics_changed"]
    if not changed:
        return [*lines, "Every metric is the same."]
    more = f"; and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    return [*lines, f"Metrics that differ: {'; '.join(changed[:_MOST_SHOWN])}{more}."]
