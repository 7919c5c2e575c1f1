"""`exitsafe compare`: two runs -> what changed, with intervals and tests, as a table, a file and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError


def compare_command(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A finished run.", show_default=False)],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="Another finished run on the same samples.", show_default=False)
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Metric to print a table of. Repeatable.", show_default="those that matter"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Also write every difference to this file.", show_default=False),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.svg|png", help="Draw a chart of both runs.", show_default=False)
    ] = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Compare two audits, paired by sample, per exit layer and per bin of layers.

    McNemar's exact test for rates, the bootstrap clustered by sample for means and bins, Holm over layers.
    """
    with console.results(as_json=json) as show:
        if chart is not None:
            from exitsafe.show.charts import check_can_draw

            check_can_draw(chart)
        from exitsafe.results.comparison import compare
        from exitsafe.results.run import load_run
        from exitsafe.show.tables import comparison_screen

        runs = [("before", load_run(before)), ("after", load_run(after))]
        comparison = compare(runs[0][1], runs[1][1])
        for name in metric or []:
            if name not in comparison.metrics:
                raise InputError(f"metric {name!r} is not in both runs; choose {', '.join(comparison.metrics)}")
        if out is not None:
            comparison.to_json(out)
        if chart is not None:
            from exitsafe.show.charts import draw_chart

            draw_chart(runs, chart)
        show(comparison.to_dict(), lambda: comparison_screen(comparison, metric))
