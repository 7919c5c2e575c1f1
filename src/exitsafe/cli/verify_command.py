"""`exitsafe verify`: an exported checkpoint and an audit of the whole model -> whether it answers as was audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, options
from exitsafe.cli.audit_plan import check_reach, judging_like, make_judges
from exitsafe.cli.models import load_model
from exitsafe.cli.run_model import read_samples_of
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, ModelError

if TYPE_CHECKING:
    from exitsafe.judges import Judge
    from exitsafe.runs import AuditRun
    from exitsafe.slim import Verification


def verify_command(
    slim: Annotated[Path, typer.Argument(metavar="SLIM", help="A folder of exitsafe export.", show_default=False)],
    against: Annotated[
        Path,
        typer.Option("--against", metavar="RUN", help="A finished run of the model and adapter it was made from."),
    ],
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Ask so many of the run's samples again, evenly over all.")
    ] = 64,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Answers that may differ. 0 fits float32; in bfloat16, on another machine or with a merged adapter "
            "rounding may flip a few.",
        ),
    ] = 0.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(metavar="nf4|int8", help="Load it quantised, as it will be served.", show_default=False),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    judge_url: options.JudgeUrl = None,
    judge_rubric: options.JudgeRubric = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Check that an exported checkpoint is what was audited: its files by their hashes, its answers by asking again.

    Exit status 0 if it is, 2 if not.
    """
    with console.results(as_json=json) as show:
        from exitsafe.runs import load_run
        from exitsafe.slim.manifest import ADAPTER
        from exitsafe.slim.verification import check_files, verify

        run = load_run(against)
        judging = options.judging(url=judge_url, rubric=judge_rubric)
        options.check_judging(judging, judges=[name for name, _ in run.judges])
        record = check_files(slim, run)
        samples = read_samples_of(run)
        vlm = load_model(
            str(slim),
            adapter=slim / ADAPTER if record.adapter == "kept" else None,
            dtype=dtype,
            device=device,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
        with console.progress_bar("Verifying", unit="answer") as progress:
            found = verify(
                vlm,
                run,
                samples,
                exit_layer=record.exit_layer,
                judges=lambda: _judges(run, judging),
                limit=limit,
                progress=progress,
            )
        document = {"slim": str(slim), "against": str(run.path), "tolerance": tolerance, **asdict(found)}
        show(document, lambda: _words(found, slim))
        if found.share_changed > tolerance:
            raise ModelError(_complaint(found, slim, run))


def _judges(run: AuditRun, given: Mapping[str, Any]) -> list[Judge]:
    """Those of the run that are known by name and that this call says how to reach; others were given in Python."""
    from exitsafe.judges import is_known

    names = []
    for name in (name for name, _ in run.judges if is_known(name)):
        try:
            check_reach(run.path, given, judge=name, is_named=False)
        except InputError as error:  # answers can be compared without its verdicts
            console.note(f"{name} was skipped: {error}")
        else:
            names.append(name)
    return make_judges(names, judging_like(run.path, given, judges=())) or []


def _words(found: Verification, slim: Path) -> list[str]:
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
    otherwise = f" (otherwise than then: {'; '.join(found.otherwise)})" if found.otherwise else ""
    return (
        f"{slim} does not answer as {run.path} did at exit {found.exit_layer}: {differ} of {found.answers} answers "
        f"and {changed} verdicts differ{otherwise}; audit it as a model of its own, or export it again"
    )
