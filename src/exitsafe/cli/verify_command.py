"""`exitsafe verify`: is it what was audited? An exported checkpoint against its audit, a finished run repeated, or the
exit that a served model runs.

Of a repeated run only what this call generated or judged is called the same: whoever forged a run can put a matching
repeat beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.cli.audit_command import audit_as_planned, reach_engine
from exitsafe.cli.models import load_model
from exitsafe.cli.run_model import load_model_of, loading_of, model_of, read_samples_of, remote_code_named
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.show.names import shown
from exitsafe.specs.inputs import FullLoading, JudgeOptions
from exitsafe.specs.verbs import VerifySpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.exporting.verification import Verification
    from exitsafe.judges import Judge
    from exitsafe.results.run import AuditRun
    from exitsafe.store.shards import Saved

_MOST_SHOWN = 5


def verify_command(spec: VerifySpec, show: console.Show) -> None:
    """Check that an exported checkpoint, a finished run or a served model is what was audited; exit status 0 if so.

    SLIM, an exported checkpoint, is compared with the audit given as --against: files by their hashes, and answers
    by asking some samples again.

    RUN, a finished audit, is repeated from its run.json, and answers, verdicts and metrics are compared.

    The model at URL, an OpenAI-compatible endpoint, is asked up to 64 harmless questions that show which exit of
    --reference it runs, and whether it runs it correctly.
    """
    given = spec.model_fields_set | spec.loading.model_fields_set
    if re.match("https?://", spec.what):
        of_url = {"what", "reference", "exit_layer", "language_model", "loading"} | spec.loading.model_fields_set
        _refuse(given - of_url, "applies only to an exported checkpoint or a run; leave it out for a URL")
        _verify_url(spec, show)
        return
    of_url_only = given & {"reference", "exit_layer", "language_model"}
    _refuse(of_url_only, "applies only to the URL of a served model; leave it out")
    if not Path(spec.what).exists():
        raise InputError(
            f"{spec.what} does not exist; give a folder written by exitsafe export, a finished run or a URL"
        )
    _refuse(given & {"encoder"}, "is recorded with the run and the checkpoint; leave it out")
    if spec.against is not None:
        _refuse(given & {"out", "engine"}, "applies only to repeating a run; leave out either it or --against")
        _verify_slim(spec, spec.against, show)
        return
    if (Path(spec.what) / "exitsafe.json").is_file():
        raise InputError(f"{spec.what} is an exported checkpoint: give the run it was made from as --against RUN")
    of_slim = {"limit", "tolerance", "dtype", "quantization", "revision"}
    _refuse(given & of_slim, "applies only to an exported checkpoint; leave it out to repeat a run")
    _verify_run(spec, show)


def _refuse(given: Collection[str], reason: str) -> None:
    for name in sorted(given):
        raise InputError(f"--{name.replace('_', '-')} {reason}")


def _verify_url(spec: VerifySpec, show: console.Show) -> None:
    from exitsafe.cli.which_exit_words import document, headline, words

    if spec.reference is None:
        raise InputError("a served model is compared with the audited one: add --reference MODEL")
    from exitsafe.engine.served_model import find_served

    model = find_served(spec.what, what="URL")
    vlm = load_model(spec.reference, FullLoading(**spec.loading.model_dump()))
    if spec.language_model is not None:
        from exitsafe.exporting.shipped_weights import take_language_model

        take_language_model(vlm, spec.language_model)
    from exitsafe.exporting.which_exit import which_exit

    with console.progress_bar("Asking", unit="question") as progress:
        found = which_exit(vlm, model, claimed=spec.exit_layer, progress=progress)
    about = {"url": model.endpoint.where, "reference": spec.reference}
    show(document(found, **about), lambda: words(found, **about, default_exit=vlm.default_exit))
    if not found.is_as_claimed:
        raise ModelError(f"{model.endpoint.where} is not what was audited: {headline(found)}")


def _verify_slim(spec: VerifySpec, against: Path, show: console.Show) -> None:
    from exitsafe.exporting.manifest import ADAPTER
    from exitsafe.judges.registry import check_options
    from exitsafe.results.run import load_run

    run, slim = load_run(against), Path(spec.what)
    check_options(spec.judging, [name for name, _ in run.judges])
    if not (slim / "exitsafe.json").is_file():
        raise ModelError(f"{slim} has no exitsafe.json: give a folder that exitsafe export wrote")
    from exitsafe.exporting.verification import check_files, verify

    record = check_files(slim, run)
    samples = read_samples_of(run)
    adapter = str(slim / ADAPTER) if record.adapter == "kept" else None
    loading = spec.loading.model_dump() | {"adapter": adapter, "encoder": record.base.encoder}
    vlm = load_model(str(slim), FullLoading(**loading))
    with console.progress_bar("Verifying", unit="answer") as progress:
        found = verify(
            vlm,
            run,
            samples,
            exit_layer=record.exit_layer,
            judges=lambda: _judges(run, spec.judging),
            limit=spec.limit,
            progress=progress,
        )
    document = {"slim": str(slim), "against": str(run.path), "tolerance": spec.tolerance, **asdict(found)}
    show(document, lambda: _slim_words(found, slim))
    if found.share_changed > spec.tolerance:
        raise ModelError(_complaint(found, slim, run))


def _verify_run(spec: VerifySpec, show: console.Show) -> None:
    from exitsafe.results.run import load_run
    from exitsafe.store.directory import saved_in
    from exitsafe.store.reading import is_finished

    what = Path(spec.what)
    before = load_run(what)
    server = before.settings["model"]["name"] if before.is_served else before.settings.get("engine", {}).get("model")
    if server is not None and spec.engine is None:
        raise InputError(
            f"the answers of {spec.what} came from a server (model {shown(server)}), and requests are sent only to an "
            "address that you give: add --engine URL"
        )
    recorded = _rows(before)  # read before the audit, which may take hours
    out = spec.out or _new_folder(what)
    if out.resolve() == what.resolve():
        raise InputError(f"{out} is the run that is to be repeated; choose another folder for --out")
    if is_finished(out):
        raise InputError(f"{out} is finished, so nothing would be repeated; choose a new folder for --out")
    earlier = saved_in(out)
    again = _repeat(before, spec, out=out)
    found = compare_runs(before, again, recorded=recorded, earlier=earlier)
    show({"run": str(before.path), "again": str(again.path), **found}, lambda: _repeat_words(found, again))
    if difference := _first_difference(found):
        raise RunError(f"{again.path} does not match {before.path}: {difference}")
    if not found["answers_generated"]:
        raise RunError(
            f"every answer was already in {again.path}, so nothing was repeated; choose a new folder for --out"
        )


def _judges(run: AuditRun, given: JudgeOptions) -> list[Judge]:
    """Those of the run that are known by name and that this call says how to reach; others were given in Python."""
    from exitsafe.auditing.judging import available_judges
    from exitsafe.auditing.reach import check_reach, judging_like
    from exitsafe.judges import is_known

    names = []
    for name in (name for name, _ in run.judges if is_known(name)):
        try:
            check_reach(run.path, given, judge=name, is_named=False)
        except InputError as error:  # answers can be compared without its verdicts
            console.note(f"{name} was skipped: {error}")
        else:
            names.append(name)
    return available_judges(names, judging_like(run.path, given, judges=()))


def _slim_words(found: Verification, slim: Path) -> list[str]:
    lines = [
        f"{slim}: every file is as it was exported.",
        f"{found.answers_same} of {found.answers} answers at exit {found.exit_layer} are those of the audit.",
    ]
    changed = [f"{name} {number}" for name, number in found.verdicts_changed.items()]
    total = sum(found.verdicts.values())
    lines.append(f"Verdicts that changed: {', '.join(changed) if changed else 'none'} (of {total}).")
    if found.not_judged_again:
        lines.append(f"Not judged again by {', '.join(found.not_judged_again)}.")
    return lines + ([f"Otherwise than then: {'; '.join(found.otherwise)}."] if found.otherwise else [])


def _complaint(found: Verification, slim: Path, run: AuditRun) -> str:
    differ = found.answers - found.answers_same
    changed = sum(found.verdicts_changed.values())
    otherwise = f" (changed since the audit: {'; '.join(found.otherwise)})" if found.otherwise else ""
    return (
        f"{slim} does not answer as {run.path} did at exit {found.exit_layer}: {differ} of {found.answers} answers "
        f"and {changed} verdicts differ{otherwise}; audit it as a separate model, or export it again"
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
) -> JsonObject:
    """Compare two runs of the same audit; apart from times, they may agree in everything.

    Args:
        before, again: The runs.
        recorded: Answers and verdicts of the first, if they have been read already.
        earlier: What the second held before this call: it may differ, but is not counted as repeated or the same.
    """
    from exitsafe.store.fingerprint import differences

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
        "settings_changed": differences(_judges_by_name({**before.settings}), _judges_by_name({**again.settings})),
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


def _repeat(before: AuditRun, spec: VerifySpec, *, out: Path) -> AuditRun:
    """The same audit in another folder; what is not the same model or data is refused before it is asked."""
    from exitsafe.auditing.judging import available_judges
    from exitsafe.auditing.plan import plan_repeat
    from exitsafe.machine.processes import this_process, wait_for_all

    if before.is_served:
        assert spec.engine is not None
        plan = plan_repeat(before, model=spec.engine, out=out, loading=FullLoading(), judging=spec.judging)
        samples = read_samples_of(before)
        judges = available_judges(plan.spec.judges, plan.spec.judging)
        return audit_as_planned(plan, spec.engine, samples, judges, title="Audit again")
    loading = loading_of(
        before,
        device=spec.loading.device if "device" in spec.loading.model_fields_set else None,
        trust_remote_code=spec.loading.trust_remote_code,
    )
    plan = plan_repeat(
        before, model=model_of(before), out=out, loading=loading, judging=spec.judging, engine=spec.engine
    )
    samples = read_samples_of(before)
    judges = available_judges(plan.spec.judges, plan.spec.judging)
    wait_for_all(this_process())  # no process makes the folder before all have looked at it
    engine = reach_engine(spec.engine)
    with remote_code_named(before, loading):
        vlm = load_model_of(before, loading, offload_decoder=engine is not None)
    vlm.today = plan.today or vlm.today
    return audit_as_planned(plan, vlm, samples, judges, title="Audit again", engine=engine)


def _metrics(summary: JsonObject) -> JsonObject:
    """A summary's numbers under readable names, then each judge's own."""
    layers = {f"exit {entry['exit_layer']}": entry["metrics"] for entry in summary["layers"]}
    bins = {name: entry["metrics"] for name, entry in summary["bins"].items()}
    return layers | bins | {name: _metrics(results) for name, results in summary.get("judges", {}).items()}


def _judges_by_name(settings: JsonObject) -> JsonObject:
    return {**settings, "judges": {judge["name"]: judge for judge in settings["judges"]}}


def _first_difference(found: JsonObject) -> str:
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


def _repeat_words(found: JsonObject, again: AuditRun) -> list[str]:
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
