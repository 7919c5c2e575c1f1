"""`exitsafe report`: finished audits or one training run -> one HTML page to read and share."""

from __future__ import annotations

from exitsafe.cli import console
from exitsafe.errors import InputError
from exitsafe.specs.verbs import ReportSpec


def report_command(spec: ReportSpec, show: console.Show) -> None:
    """Write a page about one or more audits of a model: verdict, charts, tests, transcripts and method.

    The page is self-contained and makes no requests. Runs are named after their folders, and each is compared with the
    first. The page of a training run shows its metrics by step and the answers that save_completions kept.
    """
    from exitsafe.results.run import label_runs, load_run
    from exitsafe.show.report import render_report
    from exitsafe.show.training_report import is_training_run, render_training

    texts = spec.include_unsafe_text
    trainings = [run for run in spec.runs if is_training_run(run)]
    document: dict[str, object]
    if trainings and len(spec.runs) > 1:
        raise InputError(f"{trainings[0]} is a training run; report it on its own page")
    if trainings:
        path = render_training(trainings[0], out=spec.out, include_unsafe_text=texts, title=spec.title)
        document = {"report": str(path), "training": str(trainings[0])}
    else:
        labelled = list(zip(label_runs(list(spec.runs)), map(load_run, spec.runs), strict=True))
        path = render_report(labelled, out=spec.out, include_unsafe_text=texts, title=spec.title)
        document = {"report": str(path), "runs": {label: str(run.path) for label, run in labelled}}
    document |= {"has_texts": texts, "bytes": path.stat().st_size}
    show(document, lambda: [f"{path}: open it in a browser"])
