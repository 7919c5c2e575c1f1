"""`exitsafe rerun`: a finished run -> the same audit once more, and what differs in answers, verdicts and metrics."""

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
    """Repeat an audit from its run.json and compare answers, verdicts and metrics with those of the run.

    Exit status 0 if all are the same (times aside), 2 if not.
    """
    with console.results(as_json=json) as show:
        from exitsafe.runs import load_run
        from exitsafe.runs.finished import is_finished

        before = load_run(run)
        recorded = _rows(before)  # before the audit: hours may pass until they are compared
        out = out or run.with_name(f"{run.name}-again")
        if out.resolve() == run.resolve():
            raise InputError(f"{out} is the run that is to be repeated; choose another folder for --out")
        if is_finished(out):
            console.note(f"{out} is finished already and is compared as it is; remove it to repeat the audit once more")
        judging = options.judging(url=judge_url, rubric=judge_rubric)
        again = _repeat(before, out=out, device=device, trust_remote_code=trust_remote_code, judging=judging)
        found = compare_runs(before, again, recorded=recorded)
        show({"run": str(before.path), "again": str(again.path), **found}, lambda: _words(found, again))
        if difference := _first_difference(found):
            raise RunError(f"{again.path} does not repeat {before.path}: {difference}")


Rows = tuple[dict[Any, Any], dict[Any, Any]]
"""Answers and verdicts by what they are of."""


def compare_runs(before: AuditRun, again: AuditRun, *, recorded: Rows | None = None) -> dict[str, Any]:
    """What two runs of the same audit share; times aside, they may share everything.

    Args:
        before, again: The runs.
        recorded: Answers and verdicts of the first, if they have been read already.
    """
    from exitsafe.runs.fingerprint import differences

    texts, verdicts = zip(recorded or _rows(before), _rows(again), strict=True)
    return {
        "answers": len(texts[0] | texts[1]),
        "answers_same": _num_same(*texts),
        "verdicts": len(verdicts[0] | verdicts[1]),
        "verdicts_same": _num_same(*verdicts),
        "metrics_changed": [
            line for line in differences(_metrics(before.summary), _metrics(again.summary)) if ".seconds." not in line
        ],
        "settings_changed": differences(_judges_by_name(before.settings), _judges_by_name(again.settings)),
    }


def _rows(run: AuditRun) -> Rows:
    texts = {(r.sample_id, r.exit_layer): (r.text, r.num_tokens, r.finish_reason) for r in run.responses()}
    verdicts = {
        (v.sample_id, v.exit_layer, v.judge, v.measure): (v.score, v.label, v.unscored is None) for v in run.verdicts()
    }
    return texts, verdicts


def _num_same(before: Mapping[Any, Any], again: Mapping[Any, Any]) -> int:
    return sum(row in again and again[row] == value for row, value in before.items())


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
            name: settings.get(name, "beside" if name == "judge_pass" else None)
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


def _first_difference(found: Mapping[str, Any]) -> str:
    """What explains the rest is named: settings before answers, answers before verdicts. Nothing if all is the same."""
    changed = [
        f"{found[what] - found[f'{what}_same']} of {found[what]} {what}"
        for what in ("answers", "verdicts")
        if found[what] != found[f"{what}_same"]
    ]
    if found["metrics_changed"]:
        changed.append(f"{len(found['metrics_changed'])} metrics")
    if not changed:
        return ""
    settings = (
        f"settings differ ({'; '.join(found['settings_changed'])}), and so do " if found["settings_changed"] else ""
    )
    return f"{settings}{', '.join(changed)}{'' if settings else ' differ'}"


def _words(found: Mapping[str, Any], again: AuditRun) -> list[str]:
    same = (f"{found[f'{what}_same']} of {found[what]} {what}" for what in ("answers", "verdicts"))
    lines = [f"{' and '.join(same)} are the same. Files: {again.path}"]
    if found["settings_changed"]:
        lines.append(f"Settings that differ: {'; '.join(found['settings_changed'])}.")
    changed = found["metrics_changed"]
    if not changed:
        return [*lines, "Every metric is the same."]
    more = f"; and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    return [*lines, f"Metrics that differ: {'; '.join(changed[:_MOST_SHOWN])}{more}."]
