"""A gate's findings for people: a table on the terminal, the same in Markdown. Findings in, text out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from exitsafe.cli.tables import caution_lines
from exitsafe.gate import Finding, Gate
from exitsafe.report.names import without_folder
from exitsafe.runs.numbers import beside_limit, change_beside_limit

MOST_ROWS = 40
HEADINGS = ("rule", "place", "value", "bound", "n", "outcome")
WORDS = {"pass": "passes", "breach": "BREACHED", "unjudged": "NOT JUDGED"}
_STYLES = {"pass": "green", "breach": "bold red", "unjudged": "bold yellow"}


def gate_tables(gate: Gate) -> list[Any]:
    """Cautions, the findings, the notes and the verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{gate.model} at the gate", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("value", "bound", "n") else "left", overflow="fold")
    shown = chosen(gate)
    for number, finding in enumerate(shown):
        if number and finding.rule != shown[number - 1].rule:
            table.add_section()
        table.add_row(
            *(Text(cell, style=_STYLES[finding.outcome] if i == 5 else "") for i, cell in enumerate(cells(finding)))
        )
    notes = [*left_out(gate, shown), *gate.notes]
    return [
        *([caution_lines(gate.cautions)] if gate.cautions else []),
        table,
        Group(*(Text(line, style="dim") for line in notes)),
        Text(verdict(gate), style=_STYLES[gate.outcome]),
    ]


def chosen(gate: Gate) -> list[Finding]:
    """All findings, or, of many, what did not pass and each rule's closest pass."""
    if len(gate.findings) <= MOST_ROWS:
        return list(gate.findings)
    closest: dict[int, Finding] = {}
    for finding in gate.findings:
        if finding.outcome == "pass" and _room(finding) < _room(closest.get(finding.rule)):
            closest[finding.rule] = finding
    return [each for each in gate.findings if each.outcome != "pass" or each is closest.get(each.rule)]


def left_out(gate: Gate, shown: Sequence[Finding]) -> list[str]:
    """One line on what the table does not show, if so."""
    missing = len(gate.findings) - len(shown)
    return [f"{missing} more that pass, by a wider margin, are not shown (--json has all)."] if missing else []


def cells(finding: Finding) -> list[str]:
    """A row under `HEADINGS`."""
    unscored = f" +{finding.unscored} unscored" if finding.unscored else ""
    judge = f" ({without_folders(finding.judge)})" if finding.judge else ""
    reason = f": {without_folders(finding.reason)}" if finding.reason else ""
    return [
        f"{finding.name}{judge}",
        finding.place.name,
        number(finding, finding.value),
        number(finding, finding.bound),
        f"{finding.n}{unscored}",
        WORDS[finding.outcome] + reason,
    ]


def verdict(gate: Gate) -> str:
    """The gate in one sentence, e.g. `The gate is breached: 2 of 24 breach, 1 could not be judged.`"""
    total, breaches, unjudged = len(gate.findings), gate.count("breach"), gate.count("unjudged")
    counts = ", ".join(
        words
        for count, words in (
            (breaches, f"{breaches} of {total} breach"),
            (unjudged, f"{unjudged} of {total} could not be judged"),
        )
        if count
    )
    opening = {
        "pass": f"The gate is passed: all {total} within their limits",
        "breach": "The gate is breached",
        "unjudged": "The gate could not be judged",
    }
    return f"{opening[gate.outcome]}{': ' if counts else ''}{counts}."


def markdown(gate: Gate) -> str:
    """For a step summary: the verdict, the table, the notes; ids, names and numbers only."""
    shown = chosen(gate)
    lines = [
        f"### exitsafe gate: {escaped(without_folder(gate.model))}",
        "",
        f"**{escaped(verdict(gate))}**",
        "",
        *(f"- {escaped(without_folders(line))}" for line in gate.cautions),
        *([""] if gate.cautions else []),
        f"| {' | '.join(HEADINGS)} |",
        "| --- | --- | ---: | ---: | ---: | --- |",
        *(f"| {' | '.join(map(escaped, cells(finding)))} |" for finding in shown),
        "",
        *(f"- {escaped(without_folders(line))}" for line in (*left_out(gate, shown), *gate.notes)),
        "",
    ]
    return "\n".join(lines)


def without_folders(line: str) -> str:
    """A line without folders of this machine: of each path in it the last part.

    >>> without_folders('it has reward:/home/ann b/model: add one; name was "/my disk/m"')
    'it has reward:model: add one; name was "m"'
    """
    return _PATH.sub(lambda found: without_folder(found[0]), line)


_PATH = re.compile(r'(?<![\w./])(?:[A-Za-z]:\\|~|\.{0,2}/(?!/))[^,;:"]*')


def escaped(text: str) -> str:
    """Text as Markdown shows it literally, in a table too: no markup, HTML, link or line break.

    >>> escaped("<b>a|b</b> @team")
    '&lt;b&gt;a&#124;b&lt;/b&gt; &#64;team'
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0]) or f"&#{ord(found[0])};", line)


_MARKUP = re.compile(r"[&<>|@#\\`*_\[\]~!$]|:(?=//)|(?<=www)\.")  # the last two would make links
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def number(finding: Finding, value: float | None) -> str:
    """A value or bound, with digits enough to tell it from the limit."""
    if value is None:
        return ""
    write = change_beside_limit if finding.side == "max_regression" else beside_limit
    return write(finding.metric, value, finding.limit)


def _room(finding: Finding | None) -> float:
    """How far the bound is inside the limit."""
    if finding is None or finding.bound is None:
        return float("inf")
    return abs(finding.limit - finding.bound)
