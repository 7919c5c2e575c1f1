"""What the page's words and tables are about: records only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exitsafe.comparison import Comparison
from exitsafe.records import Kind
from exitsafe.report.facts import Summary, Table
from exitsafe.report.names import shown, without_folder
from exitsafe.runs import AuditRun


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A heading, what is said under it, and the numbers that it rests on."""

    heading: str
    sentences: tuple[str, ...]
    table: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Told:
    """A run as the words need it.

    Args:
        label: Its name on the page.
        run: The run; only settings and summary are read.
        kinds: How many samples of each kind it asked.
        finished: The day its summary was written, e.g. `22 November 2026`; None if unknown.
    """

    label: str
    run: AuditRun
    kinds: Mapping[Kind, int]
    finished: str | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The first run against another; no comparison where they share no sample or no exit layer."""

    before: str
    after: str
    comparison: Comparison | None


def interval_level(summary: Summary, exit_layer: int) -> str:
    """Of attack success or its proxy: 95%, or, if the exit stopped early, the level that holds at every look."""
    stopping = summary.get("stopping", {"layers": []})
    has_stopped = any(row["exit_layer"] == exit_layer and row["decision"] is not None for row in stopping["layers"])
    return f"{100 * (1 - stopping['error']):.3g}%" if has_stopped else "95%"


def model_name(run: AuditRun) -> str:
    """As it may be shown."""
    return shown(without_folder(str(run.summary["model"])))
