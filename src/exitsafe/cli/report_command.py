"""`exitsafe report`: finished runs -> one HTML page to look at and to pass on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.settings_file import config_option


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished runs, the one to start from first.", show_default=False),
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

    Self-contained: it asks nobody for anything. Runs are named by their folders; each is compared with the first.
    """
    with console.results(as_json=json) as show:
        from exitsafe.report import render_report
        from exitsafe.report.names import label_runs
        from exitsafe.runs import load_run

        labelled = list(zip(label_runs(runs), map(load_run, runs), strict=True))
        path = render_report(labelled, out=out, include_unsafe_text=include_unsafe_text, title=title)
        document = {
            "report": str(path),
            "runs": {label: str(run.path) for label, run in labelled},
            "has_texts": include_unsafe_text,
            "bytes": path.stat().st_size,
        }
        show(document, lambda: [f"{path}: open it in a browser"])
