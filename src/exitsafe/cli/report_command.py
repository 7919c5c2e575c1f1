"""`exitsafe report`: finished audits or one training run -> one HTML page to read and share."""

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
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="HTML file to write.", show_default=False)],
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Title of the page.", show_default="names the model")
    ] = None,
    include_unsafe_text: Annotated[
        bool,
        typer.Option(
            "--include-unsafe-text",
            help="Include the models' unfiltered answers; the file is then readable by you only.",
        ),
    ] = False,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Write a page about one or more audits of a model: verdict, charts, tests, transcripts and method.

    The page is self-contained and makes no requests. Runs are named after their folders, and each is compared with the
    first. The page of a training run shows its metrics by step and the answers that --save-completions kept.
    """
    with console.results(as_json=json) as show:
        from exitsafe.results.run import label_runs, load_run
        from exitsafe.show.page import render_report
        from exitsafe.show.training import is_training_run, render_training

        trainings = [run for run in runs if is_training_run(run)]
        document: dict[str, object]
        if trainings and len(runs) > 1:
            raise InputError(f"{trainings[0]} is a training run; report it on its own page")
        if trainings:
            path = render_training(runs[0], out=out, include_unsafe_text=include_unsafe_text, title=title)
            document = {"report": str(path), "training": str(runs[0])}
        else:
            labelled = list(zip(label_runs(runs), map(load_run, runs), strict=True))
            path = render_report(labelled, out=out, include_unsafe_text=include_unsafe_text, title=title)
            document = {"report": str(path), "runs": {label: str(run.path) for label, run in labelled}}
        document |= {"has_texts": include_unsafe_text, "bytes": path.stat().st_size}
        show(document, lambda: [f"{path}: open it in a browser"])
