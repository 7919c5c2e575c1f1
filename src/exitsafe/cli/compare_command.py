"""`exitsafe compare`: two runs -> what changed, with intervals and tests, as a table, a file and a chart."""

from __future__ import annotations

from exitsafe.cli import console
from exitsafe.errors import InputError
from exitsafe.specs.verbs import CompareSpec


def compare_command(spec: CompareSpec, show: console.Show) -> None:
    """Compare two audits, paired by sample, per exit layer and per bin of layers.

    McNemar's exact test for rates, the bootstrap clustered by sample for means and bins, Holm over layers.
    """
    if spec.chart is not None:
        from exitsafe.show.charts import check_can_draw

        check_can_draw(spec.chart)
    from exitsafe.results.comparison import compare
    from exitsafe.results.run import load_run
    from exitsafe.show.tables import comparison_screen

    runs = [("before", load_run(spec.before)), ("after", load_run(spec.after))]
    comparison = compare(runs[0][1], runs[1][1])
    for name in spec.metrics:
        if name not in comparison.metrics:
            raise InputError(f"metric {name!r} is not in both runs; choose {', '.join(comparison.metrics)}")
    if spec.out is not None:
        comparison.to_json(spec.out)
    if spec.chart is not None:
        from exitsafe.show.charts import draw_chart

        draw_chart(runs, spec.chart)
    show(comparison.to_dict(), lambda: comparison_screen(comparison, list(spec.metrics) or None))
