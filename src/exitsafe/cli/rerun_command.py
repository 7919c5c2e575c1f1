"""`exitsafe rerun`: a finished run -> the same audit once more, and what differs in answers, verdicts and metrics.

Only what this call generated or judged is called the same: whoever forged a run can put a matching repeat beside it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, options
from exitsafe.cli.audit_plan import DECODING, AuditPlan, audit_as_planned, judging_like, make_judges, settings_of
from exitsafe.cli.run_model import load_model_of, loading_of, origin_of_model, read_samples_of, remote_code_named
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, RunError

if TYPE_CHECKING:
    from exitsafe.runs import AuditRun
    from exitsafe.runs.shards import Saved

_MOST_SHOWN = 5


def rerun_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the repeat. An unfinished repeat is resumed only if it is named here.",
            show_default="RUN-again, or RUN-again-2 and so on",
            file_okay=False,
        ),
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

    Exit status 0 if all are the same (times aside), 2 if not, or if this call generated no answer.
    """
    with console.results(as_json=json) as show:
        from exitsafe.runs import load_run
        from exitsafe.runs.directory import saved_in
        from exitsafe.runs.finished import is_finished
        from exitsafe.vlm.processes import this_process, wait_for_all

        before = load_run(run)
        recorded = _rows(before)  # read before the audit, which may take hours
        out = out or _new_folder(run)
        if out.resolve() == run.resolve():
            raise InputError(f"{out} is the run that is to be repeated; choose another folder for --out")
        if is_finished(out):
            raise InputError(f"{out} is finished, so nothing would be repeated; choose a new folder for --out")
        earlier = saved_in(out)
        wait_for_all(this_process())  # no process makes the folder before all have looked at it
        judging = options.judging(url=judge_url, rubric=judge_rubric)
        again = _repeat(before, out=out, device=device, trust_remote_code=trust_remote_code, judging=judging)
        found = compare_runs(before, again, recorded=recorded, earlier=earlier)
        show({"run": str(before.path), "again": str(again.path), **found}, lambda: _words(found, again))
        if difference := _first_difference(found):
            raise RunError(f"{again.path} does not match {before.path}: {difference}")
        if not found["answers_generated"]:
            raise RunError(
                f"every answer was already in {again.path}, so nothing was repeated; choose a new folder for --out"
            )


def _new_folder(run: Path) -> Path:
    """A free name beside the run: whatever is there already may have come with the run."""
    run = run.resolve() if run.name in ("", "..") else run
    names = (f"{run.name}-again{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(run.with_name(name) for name in names if not os.path.lexists(run.with_name(name)))


Rows = tuple[dict[Any, Any], dict[Any, Any]]
"""Answers and verdicts, each by its key."""


def compare_runs(
    before: AuditRun, again: AuditRun, *, recorded: Rows | None = None, earlier: Saved | None = None
) -> dict[str, Any]:
    """Compare two runs of the same audit; apart from times, they may agree in everything.

    Args:
        before, again: The runs.
        recorded: Answers and verdicts of the first, if they have been read already.
        earlier: What the second held before this call: it may differ, but is not counted as repeated or the same.
    """
    from exitsafe.runs.fingerprint import differences

    texts, verdicts = zip(recorded or _rows(before), _rows(again), strict=True)
    known: tuple[set[Any], set[Any]] = (set(), set())
    if earlier is not None:
        said = {(v.sample_id, v.exit_layer, v.judge, v.measure) for v in earlier.verdicts}
        known = (set(earlier.responses), said)
    return {
        **_counts("answers", "generated", *texts, known[0]),
        **_counts("verdicts", "judged", *verdicts, known[1]),
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


def _counts(
    what: str, how: str, before: Mapping[Any, Any], again: Mapping[Any, Any], known: Collection[Any]
) -> dict[str, int]:
    """All rows, those that this call made, those of them that are as before, and all that are not."""
    changed = {row for row in before.keys() | again.keys() if row not in before or before[row] != again.get(row)}
    made = again.keys() - known
    return {
        what: len(before.keys() | again.keys()),
        f"{what}_{how}": len(made),
        f"{what}_same": len(made - changed),
        f"{what}_different": len(changed),
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
            name: settings.get(name, "beside" if name == "judge_pass" else None)
            for name in (*DECODING, "skip_global", "batch_size", "stop_when", "judge_pass")
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
    """The differences, causes first: settings, then answers, then verdicts. Empty if all is the same."""
    changed = [
        f"{found[f'{what}_different']} of {found[what]} {what}"
        for what in ("answers", "verdicts")
        if found[f"{what}_different"]
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
    made = {"answers": found["answers_generated"], "verdicts": found["verdicts_judged"]}
    earlier = [f"{found[what] - number} {what}" for what, number in made.items() if number < found[what]]
    same = (f"{found[f'{what}_same']} of {number} {what}" for what, number in made.items())
    lines = [f"{' and '.join(same)} of this call are the same. Files: {again.path}"]
    if earlier:
        lines.append(f"Not repeated by this call: {' and '.join(earlier)}, which were already there.")
    if found["settings_changed"]:
        lines.append(f"Settings that differ: {'; '.join(found['settings_changed'])}.")
    changed = found["metrics_changed"]
    if not changed:
        return [*lines, "No metric differs." if earlier else "Every metric is the same."]
    more = f"; and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    return [*lines, f"Metrics that differ: {'; '.join(changed[:_MOST_SHOWN])}{more}."]
