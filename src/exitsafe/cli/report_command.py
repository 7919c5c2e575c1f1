"""`exitsafe report`: finished audits, or one training run -> one HTML page to read and to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Finished audits, the baseline first; or one training run.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page.", show_default=False)],
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Above the page.", show_default="names the model")
    ] = None,
    include_unsafe_text: Annotated[
        bool,
        typer.Option(
            "--include-unsafe-text",
            help="Put what the models answered into the page, unfiltered; only you can then read the file.",
        ),
    ] = False,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """One page about one or more audits of a model: summary in words, charts, tables, tests, transcripts, method.

    The page is self-contained and makes no requests. Runs are named by their folders; each is compared with the first.
    The page of a training run shows its metrics by step and the answers that --save-completions kept.
    """
    with console.results(as_json=json) as show:
        from exitsafe.report import render_report
        from exitsafe.report.training import is_training_run, render_training
        from exitsafe.runs import load_run
        from exitsafe.runs.finished import label_runs

        if trainings := [run for run in runs if is_training_run(run)]:
            if len(runs) > 1:
                raise InputError(f"{trainings[0]} is a training run, which gets its own page: report it alone")
            path = render_training(runs[0], out=out, include_unsafe_text=include_unsafe_text, title=title)
            document = {"report": str(path), "training": str(runs[0]), "has_texts": include_unsafe_text}
            show(document | {"bytes": path.stat().st_size}, lambda: [f"{path}: open it in a browser"])
            return
        labelled = list(zip(label_runs(runs), map(load_run, runs), strict=True))
        path = render_report(labelled, out=out, include_unsafe_text=include_unsafe_text, title=title)
        document = {
            "report": str(path),
            "runs": {label: str(run.path) for label, run in labelled},
            "has_texts": include_unsafe_text,
            "bytes": path.stat().st_size,
        }
        show(document, lambda: [f"{path}: open it in a browser"])
