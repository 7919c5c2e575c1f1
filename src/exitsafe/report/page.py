"""The report page on one screen: runs in, one self-contained HTML file out.

The page asks nobody for anything and says so in its content security policy: styles and the one script are named by
their hashes, everything else is forbidden. Every name and text from a run passes Jinja's autoescape.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exitsafe import __version__
from exitsafe.comparison import Comparison, check_comparable, compare
from exitsafe.errors import ExitsafeError, InputError
from exitsafe.report.chart import LabelledRun
from exitsafe.report.looks import LOOKS, MARKER_PATHS, STEP_COLORS, STEPS
from exitsafe.report.names import shown
from exitsafe.report.told import Compared, Told, model_name
from exitsafe.report.words import summary_in_words
from exitsafe.runs import AuditRun
from exitsafe.runs.files import PRIVATE, PUBLIC, write_whole, writing
from exitsafe.runs.metrics import AGGREGATES
from exitsafe.runs.scores import ScoreTable

_NEEDED = ("altair", "jinja2", "vl_convert")


def render_report(
    runs: Sequence[LabelledRun], *, out: str | Path, include_unsafe_text: bool = False, title: str | None = None
) -> Path:
    """Write one self-contained HTML page about one or more audits of one model.

    Args:
        runs: (label, run) pairs, the run to start from first; labels differ.
        out: Where to; replaced if it is there.
        include_unsafe_text: Put what the model answered into the page, which then only its owner can read.
        title: Above the page; names the model if left out.

    Returns:
        The path.

    Raises:
        InputError: On no run, more runs than there are line styles, labels that are the same, or models that differ.
        RunError: If a run cannot be read, or the page cannot be written.
        ExitsafeError: Without the extra that draws.
    """
    out = Path(out)
    _check(runs, out)
    from markupsafe import Markup

    from exitsafe.report.transcripts import build_transcripts

    runs = [(label, _ReadOnce(**vars(run))) for label, run in runs]
    tables = [run.score_table() for _, run in runs]
    told = [_told(label, run, table) for (label, run), table in zip(runs, tables, strict=True)]
    compared = _compared(runs, tables)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    transcripts = build_transcripts(runs, out=out, include_unsafe_text=include_unsafe_text)
    content = _content(runs, tables, told, compared)
    template = page_environment().get_template("page.html.j2")
    page = template.render(
        title=shown(title or f"{model_name(runs[0][1])}: safety by exit layer", max_length=200),
        policy=security_policy(styles=[page_style(), transcripts.style], scripts=[transcripts.script]),
        # no name from a run gets here: styles, script and data are what is not escaped
        style=Markup(page_style()),  # noqa: S704
        transcripts_style=Markup(transcripts.style),  # noqa: S704
        transcripts_script=Markup(transcripts.script),  # noqa: S704
        transcripts_data=Markup(transcripts.data),  # noqa: S704
        transcripts=transcripts.html,
        include_unsafe_text=include_unsafe_text,
        version=__version__,
        sections=_sections(content),
        **content,
    )
    write_whole(out, page.encode(), mode=PRIVATE if include_unsafe_text else PUBLIC)
    return out


class _ReadOnce(AuditRun):
    """A run whose scores are read once: half a million answers take seconds, and comparing wants them too."""

    def score_table(self) -> ScoreTable:
        return self._scores

    @cached_property
    def _scores(self) -> ScoreTable:
        return super().score_table()


def check_can_render() -> None:
    """Fail now if a page could not be made.

    Raises:
        ExitsafeError: Without the extra that draws.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ExitsafeError(
            f'the report needs {", ".join(missing)}, which is not installed: pip install "exitsafe[report]"'
        )


def _check(runs: Sequence[LabelledRun], out: Path) -> None:
    check_can_render()
    if not 1 <= len(runs) <= len(LOOKS):
        raise InputError(f"{len(runs)} runs do not make one report; give 1 to {len(LOOKS)}")
    labels = [shown(label) for label, _ in runs]
    if len(set(labels)) < len(labels):
        raise InputError(f"two runs are called {next(x for x in labels if labels.count(x) > 1)}; label them apart")
    check_comparable([run for _, run in runs])
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the file to write, e.g. {out / 'report.html'}")


def _told(label: str, run: AuditRun, table: ScoreTable) -> Told:
    path = run.path / "summary.json"
    day = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC) if path.exists() else None
    finished = None if day is None else f"{day.day} {day:%B %Y}"
    return Told(label=label, run=run, kinds=Counter(sample.kind for sample in table.samples), finished=finished)


def _compared(runs: Sequence[LabelledRun], tables: Sequence[ScoreTable]) -> list[Compared]:
    """The first run against each other, where they share anything."""
    found = []
    for (label, run), table in list(zip(runs, tables, strict=True))[1:]:
        asked = [{(sample.id, sample.digest) for sample in each.samples} for each in (tables[0], table)]
        share = asked[0] & asked[1] and set(runs[0][1].exit_layers) & set(run.exit_layers)
        comparison: Comparison | None = compare(runs[0][1], run) if share else None
        found.append(Compared(before=runs[0][0], after=label, comparison=comparison))
    return found


def _content(
    runs: Sequence[LabelledRun], tables: Sequence[ScoreTable], told: Sequence[Told], compared: Sequence[Compared]
) -> dict[str, Any]:
    """Charts and tables for the template."""
    from exitsafe.report.categories import category_rates
    from exitsafe.report.changes import in_short
    from exitsafe.report.charts import category_figures, metric_figures, scatter_figure
    from exitsafe.report.facts import against_default_tables, agreement_table, bin_table, comparison_tables
    from exitsafe.report.method import limits, method_table, set_otherwise

    rates = [category_rates(run, table) for (_, run), table in zip(runs, tables, strict=True)]
    return {
        "in_short": list(in_short(told, compared)),
        "has_stopped": any("stopping" in each.run.summary for each in told),
        "passages": summary_in_words(told, compared),
        "legend": [
            (shown(label), look, MARKER_PATHS[look.marker]) for (label, _), look in zip(runs, LOOKS, strict=False)
        ],
        "steps": list(zip(STEP_COLORS, STEPS, (*STEPS[1:], 1.0), strict=True)),
        "metrics": list(metric_figures(runs)),
        "categories": list(category_figures(runs, rates)),
        "scatter": scatter_figure(runs),
        "bins": (bins := bin_table(runs)),
        "has_aggregates": bins is not None
        and any(f"({name})" in row.cells[0] for row in bins.rows for name in AGGREGATES.values()),
        "agreement": agreement_table(runs),
        "differences": [
            (
                shown(pair.before),
                shown(pair.after),
                list(comparison_tables(pair.comparison, shown(pair.before), shown(pair.after))),
            )
            for pair in compared
            if pair.comparison is not None
        ],
        "against_default": [(shown(label), list(against_default_tables(run))) for label, run in runs],
        "method": method_table(told),
        "set_otherwise": set_otherwise(told, compared),
        "limits": list(limits(told, compared)),
    }


_SECTIONS = {
    "summary": "Summary",
    "charts": "By exit layer",
    "categories": "By category",
    "trade": "Safety against utility",
    "agreement": "Judges",
    "bins": "Early, middle, late",
    "tests": "Tests",
    "transcripts": "Transcripts",
    "limits": "Limits",
    "method": "Method",
}


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ids and names of the sections that the page has."""
    is_there = {
        "categories": content["categories"],
        "trade": content["scatter"],
        "agreement": content["agreement"],
        "bins": content["bins"],
        "tests": content["differences"] or content["against_default"],
    }
    return [(name, heading) for name, heading in _SECTIONS.items() if is_there.get(name, True)]


def security_policy(*, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """The content security policy: nothing from anywhere, and of what is inline only these."""
    named = {"style-src": styles, "script-src": scripts}
    parts = [" ".join([name, *(f"'sha256-{_hash(text)}'" for text in texts)]) for name, texts in named.items()]
    # the empty icon keeps browsers from asking for one
    return "; ".join(["default-src 'none'", *parts, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def page_style() -> str:
    return (files("exitsafe.report") / "templates" / "style.css").read_text(encoding="utf-8")


@cache
def page_environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("exitsafe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
