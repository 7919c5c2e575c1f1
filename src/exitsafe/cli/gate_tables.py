"""A gate's findings as one table, for the terminal and for a step summary. Findings in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from exitsafe.gate import Finding, Gate, Outcome, Place
from exitsafe.results.numbers import beside_limit, change_beside_limit, number_list
from exitsafe.show.names import without_folder, without_folders
from exitsafe.show.table import Column, Row, Table, Tone, markdown_text

MOST_ROWS = 40
_MOST_PLACES = 8
_COLUMNS = (
    *(Column(heading=heading, is_number=False) for heading in ("rule", "place")),
    *(Column(heading=heading) for heading in ("value", "bound", "n")),
    Column(heading="outcome", is_number=False),
)
_WORDS: dict[Outcome, tuple[str, Tone]] = {
    "pass": ("passes", "good"),
    "breach": ("BREACHED", "bad"),
    "unjudged": ("NOT JUDGED", "unsure"),
}
_CLOSE = "BREACHED by its interval"


def gate_table(gate: Gate) -> Table:
    """What was judged as rows, each rule named once; what could not be judged as one note, with the way to fix it."""
    judged = [finding for finding in gate.findings if finding.outcome != "unjudged"]
    shown = _chosen(judged)
    rules = [finding.rule for finding in shown]
    notes = [*_unjudged([finding for finding in gate.findings if finding.outcome == "unjudged"], len(gate.findings))]
    if any(finding.is_close for finding in judged):
        notes.append(f"{_CLOSE}: the value is within the limit; more samples may show that the bound is, too.")
    if len(judged) > len(shown):
        notes.append(f"{len(judged) - len(shown)} more pass by a wider margin (--json lists all).")
    return Table(
        title=f"{gate.model} at the gate",
        columns=_COLUMNS,
        rows=tuple(
            _row(finding, is_first=number == 0 or finding.rule != rules[number - 1], is_top=number == 0)
            for number, finding in enumerate(shown)
        ),
        cautions=gate.cautions,
        notes=(*notes, *gate.notes),
    )


def _row(finding: Finding, *, is_first: bool, is_top: bool) -> Row:
    unscored = f" +{finding.unscored} unscored" if finding.unscored else ""
    word, tone = _WORDS[finding.outcome]
    return Row(
        cells=(
            _rule(finding) if is_first else "",
            finding.place.name,
            number(finding, finding.value),
            number(finding, finding.bound),
            f"{finding.n}{unscored}",
            _CLOSE if finding.is_close else word,
        ),
        tone=tone,
        is_after_line=is_first and not is_top,
    )


def _rule(finding: Finding) -> str:
    return finding.name + (f" ({without_folders(finding.judge)})" if finding.judge else "")


def _chosen(findings: Sequence[Finding]) -> Sequence[Finding]:
    """All, or, of many, what did not pass and each rule's closest pass."""
    if len(findings) <= MOST_ROWS:
        return findings
    closest: dict[int, Finding] = {}
    for finding in findings:
        if finding.outcome == "pass" and _room(finding) < _room(closest.get(finding.rule)):
            closest[finding.rule] = finding
    return [each for each in findings if each.outcome != "pass" or each is closest.get(each.rule)]


def _unjudged(findings: Sequence[Finding], total: int) -> Iterator[str]:
    """One line: rules with their places and reasons, each once, then what to do."""
    if not findings:
        return
    alike: dict[tuple[int, str], list[Finding]] = {}
    for finding in findings:
        # how many samples there are may differ from place to place
        alike.setdefault((finding.rule, "" if finding.needed else finding.reason), []).append(finding)
    said = []
    for own in alike.values():
        places, reasons = [finding.place for finding in own], {finding.reason for finding in own}
        where = "" if places == [Place()] else f", {_in_words(places)}"
        reason = reasons.pop() if len(reasons) == 1 else "too few samples"
        said.append(f"{_rule(own[0])}{where} ({without_folders(reason)})")
    fixes = dict.fromkeys(finding.fix for finding in findings)
    yield f"{_WORDS['unjudged'][0]}, {len(findings)} of {total}: {'; '.join(said)}. To fix: {'; '.join(fixes)}."


def _in_words(places: Sequence[Place]) -> str:
    """Places, with exits in ranges: `exits 1-4, 7`."""
    exits: dict[Place, list[int]] = {}
    for place in places:
        exits.setdefault(replace(place, exit_layer=None), []).extend(
            [] if place.exit_layer is None else [place.exit_layer]
        )
    words = []
    for place, layers in exits.items():
        name = place.name if len(layers) < 2 else f"exits {number_list(layers)}"
        if len(layers) == 1:
            name = replace(place, exit_layer=layers[0]).name
        elif layers and place.category is not None:
            name = f"{place.name.removesuffix(', the run')}, {name}"
        words.append(name)
    more = len(words) - _MOST_PLACES
    return "; ".join(words[:_MOST_PLACES]) + (f"; and {more} more" if more > 0 else "")


def verdict(gate: Gate) -> str:
    """The gate in one sentence, e.g. `The gate is breached: 2 of 24 breach, 1 of 24 could not be judged.`"""
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
        "unjudged": "The gate is not passed",
    }
    return f"{opening[gate.outcome]}{': ' if counts else ''}{counts}."


def markdown(gate: Gate) -> str:
    """For a step summary: the verdict, the table, the notes; ids, names and numbers only."""
    table = gate_table(gate)
    table = replace(
        table,
        cautions=tuple(map(without_folders, table.cautions)),
        notes=tuple(map(without_folders, table.notes)),
    )
    heading, opening = markdown_text(without_folder(gate.model)), markdown_text(verdict(gate))
    return f"### exitsafe gate: {heading}\n\n**{opening}**\n\n{table.markdown()}\n"


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
