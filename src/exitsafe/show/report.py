"""The report page on one screen: runs in, one self-contained HTML file out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exitsafe.errors import InputError
from exitsafe.results.comparison import compare
from exitsafe.results.metrics import AGGREGATES
from exitsafe.results.run import AuditRun
from exitsafe.show.charts import category_figures, check_runs, metric_figures
from exitsafe.show.drawing import LOOKS, STEP_COLORS, STEPS
from exitsafe.show.findings import findings, limits, model_name, settings_changed
from exitsafe.show.html_page import check_can_render, check_can_write, write_page
from exitsafe.show.names import shown
from exitsafe.show.tables import LabelledRun, comparison_tables, default_tables, judges_tables, method_table
from exitsafe.show.transcripts import build_transcripts
from exitsafe.show.verdict import Compared, cautions, key_numbers, verdict

_SECTIONS = {
    "findings": "Findings",
    "charts": "By exit layer",
    "categories": "By category",
    "agreement": "Judges",
    "tests": "Tests",
    "transcripts": "Transcripts",
    "limits": "Limits",
    "method": "Method",
}


def render_report(
    runs: Sequence[LabelledRun], *, out: str | Path, include_unsafe_text: bool = False, title: str | None = None
) -> Path:
    """Write one self-contained HTML page about one or more audits of one model.

    Args:
        runs: (label, run) pairs, the baseline first; labels must differ.
        out: The file to write; replaced if it exists.
        include_unsafe_text: Put the models' answers into the page, which then only its owner can read.
        title: The page's title; names the model if left out.

    Returns:
        The path.

    Raises:
        InputError: On no runs, more runs than there are line styles, equal labels, or models that differ.
        RunError: If a run cannot be read, or the page cannot be written.
        ExitsafeError: Without the extra `report`.
    """
    out = Path(out)
    check_can_render()
    runs = [(shown(label), run) for label, run in runs]
    _check(runs)
    # scores are read once: those of half a million answers take seconds
    runs = [(label, replace(run, table=run.score_table())) for label, run in runs]
    compared = {label: compare(runs[0][1], run) if _can_compare(runs[0][1], run) else None for label, run in runs[1:]}
    check_can_write(out)
    transcripts = build_transcripts(runs, out=out, include_unsafe_text=include_unsafe_text)
    content = _content(runs, compared)
    return write_page(
        out,
        "report.html.j2",
        title=title or f"{model_name(runs[0][1])}: safety by exit layer",
        include_unsafe_text=include_unsafe_text,
        styles=[transcripts.style],
        scripts=[transcripts.script],
        transcripts=transcripts,
        sections=[(name, heading) for name, heading in _SECTIONS.items() if content.get(name, True)],
        **content,
    )


def _check(runs: Sequence[LabelledRun]) -> None:
    check_runs(runs)
    labels = [label for label, _ in runs]
    if len(set(labels)) < len(labels):
        raise InputError(f"two runs are called {next(x for x in labels if labels.count(x) > 1)}; label them apart")


def _can_compare(before: AuditRun, after: AuditRun) -> bool:
    """Whether they share a request and an exit."""
    asked = [{(sample.id, sample.digest) for sample in run.score_table().samples} for run in (before, after)]
    return bool(asked[0] & asked[1] and set(before.exit_layers) & set(after.exit_layers))


def _content(runs: Sequence[LabelledRun], compared: Compared) -> dict[str, object]:
    """What the template shows; sections without content are left out."""
    figures = list(metric_figures(runs))
    aggregates = tuple(AGGREGATES.values())
    first = next((figure for figure in figures if figure.name.startswith("chart-asr-")), None)
    return {
        "verdict": verdict(runs, compared),
        "cautions": list(cautions(runs, compared)),
        "numbers": key_numbers(runs),
        "first_figure": first,
        "legend": [(label, look) for (label, _), look in zip(runs, LOOKS, strict=False)],
        "findings": list(findings(runs, compared)),
        "charts": [figure for figure in figures if figure is not first],
        "has_aggregates": any(row.cells[0].startswith(aggregates) for each in figures for row in each.table.rows),
        "has_stopped": any("stopping" in run.summary for _, run in runs),
        "categories": list(category_figures(runs)),
        "steps": list(zip(STEP_COLORS, STEPS, (*STEPS[1:], 1.0), strict=True)),
        "agreement": judges_tables(runs),
        "tests": [
            *(
                (f"{runs[0][0]} and {after}", comparison_tables(comparison, before=runs[0][0], after=after))
                for after, comparison in compared.items()
                if comparison is not None
            ),
            *(
                (f"{label}: each exit against the default one", tables)
                for label, run in runs
                if (tables := default_tables(run))
            ),
        ],
        "limits": list(limits(runs, compared)),
        "settings_changed": settings_changed(runs, compared),
        "method": method_table(runs),
    }
