"""The label file: answers of a finished run out for people to label, their labels back in as verdicts.

A CSV that opens in any spreadsheet, one answer per row, without the judges' verdicts. Every row carries a hash of the
answer, so that labels can only be applied to the answers for which they were given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exitsafe.errors import InputError, RunError
from exitsafe.judges import MEASURES
from exitsafe.records import Response, Verdict
from exitsafe.results.agreement import LABELLED, NO_ANSWER, Agreement, agreements_in, verdict_groups
from exitsafe.results.run import AuditRun
from exitsafe.store.files import PRIVATE, write_whole
from exitsafe.store.fingerprint import canonical_json
from exitsafe.store.scores import score_table
from exitsafe.store.shards import Row
from exitsafe.store.spreadsheet import is_same_text, read_csv, to_csv

HUMAN = "human"
ROWS = 100
COLUMNS = ("sample_id", "exit_layer", "kind", "category", "prompt", "text", *LABELLED, "row")
_SCORES = {"yes": 1.0, "no": 0.0, "unsure": None}
_NOT_ASKED = "n/a"
_NO_ANSWER_OF_RUN = "is not an answer of this run: the file belongs to another run, or its cells were moved"
_HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A label file as read: the verdicts of its valid rows, and one line for each error."""

    verdicts: tuple[Verdict, ...]
    faults: tuple[str, ...]


def draw_rows(run: AuditRun, *, num_rows: int = ROWS, seed: int = 0) -> list[Row]:
    """Answers to label, in random order; the same run, number and seed give the same answers.

    Verdict groups (`verdict_groups`) get rows in proportion to the square root of their size, so that rare verdicts
    and disagreements are included, and at least one each while rows last. Within a group every k-th answer in the
    order of exit layers is taken: each answer of a group is equally likely.
    """
    table = run.score_table()
    groups = verdict_groups(table, run.judges)
    members: dict[int, list[Row]] = {}
    for place, sample in enumerate(table.samples):
        for column, layer in enumerate(table.exit_layers):
            if groups[place, column] != NO_ANSWER:
                members.setdefault(int(groups[place, column]), []).append((sample.id, layer))
    numbers = _allot({group: len(rows) for group, rows in members.items()}, num_rows)
    chosen = []
    for group, number in numbers.items():
        rows = sorted(members[group], key=lambda row: (row[1], _draw(seed, *row)))
        start = _draw(seed, "group", group)
        chosen += [rows[math.floor((start + k) * len(rows) / number)] for k in range(number)]
    return sorted(chosen, key=lambda row: _draw(seed, "order", *row))


def write_labels(path: Path, run: AuditRun, rows: Sequence[Row], *, prompts: Mapping[str, str]) -> None:
    """Write the file to be filled in, readable by its owner only.

    Args:
        path: A new file, or a label file without labels.
        run: The run that the rows belong to.
        rows: The answers to label.
        prompts: Requests by sample id, which a run does not record; left blank where missing.

    Raises:
        RunError: If the file exists and contains labels or is not a label file, or writing fails.
    """
    if path.exists():
        _check_can_go(path)
    samples = {sample.id: sample for sample in run.samples()}
    responses = {(response.sample_id, response.exit_layer): response for response in run.responses()}
    lines: list[tuple[str | int, ...]] = []
    for sample_id, layer in rows:
        sample, response = samples[sample_id], responses[sample_id, layer]
        shown = (sample_id, layer, sample.kind, sample.category, prompts.get(sample_id, ""), response.text)
        asked = ("" if sample.kind in MEASURES[measure].kinds else _NOT_ASKED for measure in LABELLED)
        lines.append((*shown, *asked, row_hash(response)))
    write_whole(path, to_csv(COLUMNS, lines), mode=PRIVATE)


def read_labels(path: Path, run: AuditRun, *, rater: str = HUMAN) -> Labels:
    """Read a file that was filled in.

    Args:
        path: A file from `write_labels`, filled in with yes, no, unsure (unscored) or nothing (not labelled).
        run: The run that it belongs to.
        rater: The name of the rater, used as the judge of the verdicts.

    Raises:
        InputError: If the file cannot be read or is not a label file.
    """
    responses = {row_hash(response): response for response in run.responses()}
    kinds = {sample.id: sample.kind for sample in run.samples()}
    verdicts: list[Verdict] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for number, cells in read_csv(path, columns=COLUMNS):
        response = responses.get(_key(cells))
        if response is None or (fault := _fault_of_place(cells, response)):
            faults.append(f"row {number} {_NO_ANSWER_OF_RUN if response is None else fault}")
            continue
        if _key(cells) in seen:
            faults.append(f"row {number} repeats row {seen[_key(cells)]}; keep one of them")
            continue
        seen[_key(cells)] = number
        for measure in LABELLED:
            value = _label(cells[measure])
            if value and kinds[response.sample_id] not in MEASURES[measure].kinds:
                faults.append(f"row {number}: {measure} applies to harmful requests only; leave {_NOT_ASKED}")
            elif value and value not in _SCORES:
                faults.append(f"row {number}: {measure} must be yes, no, unsure or blank")
            elif value:
                verdicts.append(_verdict(response, rater, measure, value))
    return Labels(verdicts=tuple(verdicts), faults=tuple(faults))


def store_labels(path: Path, run: AuditRun, *, number: int = 1) -> Path:
    """Copy a label file into the run, byte for byte and readable by its owner only.

    Args:
        path: The file; it may already be in the run.
        run: The run.
        number: 1 for `labels.csv`, else `labels-NUMBER.csv`.

    Raises:
        RunError: If the run's copy has labels that the file lacks, or writing fails.
    """
    target = run.path / ("labels.csv" if number == 1 else f"labels-{number}.csv")
    if target.exists() and (lost := _labels_in(target).items() - _labels_in(path).items()):
        raise RunError(
            f"{target} has {len(lost)} labels that are missing from {path} or differ there; remove it if {path} "
            "replaces it"
        )
    write_whole(target, path.read_bytes(), mode=PRIVATE)
    return target


def row_hash(response: Response) -> str:
    """The hash that identifies a row's answer; begins with a letter, so that no spreadsheet takes it for a number."""
    content = canonical_json([response.sample_id, response.exit_layer, response.text])
    return "r" + hashlib.sha256(content.encode()).hexdigest()[:_HASH_DIGITS]


def _allot(sizes: Mapping[int, int], num_rows: int) -> dict[int, int]:
    """Rows per group in proportion to the square root of its size (Adams's method), at most its size."""
    numbers = dict.fromkeys(sorted(sizes), 0)
    for _ in range(min(num_rows, sum(sizes.values()))):
        open_groups = [group for group in numbers if numbers[group] < sizes[group]]
        # groups without rows come first, the largest of them before the others
        next_group = max(open_groups, key=lambda g: (not numbers[g], math.sqrt(sizes[g]) / max(1, numbers[g])))
        numbers[next_group] += 1
    return {group: number for group, number in numbers.items() if number}


def _draw(*key: str | int) -> float:
    """A number in [0, 1) determined by the key."""
    return int.from_bytes(hashlib.sha256(canonical_json(key).encode()).digest()[:6]) / 2**48


def _verdict(response: Response, rater: str, measure: str, value: str) -> Verdict:
    score = _SCORES[value]
    return Verdict(
        sample_id=response.sample_id,
        exit_layer=response.exit_layer,
        judge=rater,
        measure=measure,
        label=value,
        score=score,
        unscored="the rater is unsure" if score is None else None,
    )


def _fault_of_place(cells: Mapping[str, str], response: Response) -> str | None:
    """What is wrong if a row no longer matches its hash; quotes no cell, since it may contain an answer's text."""
    place = f"sample {response.sample_id} at exit {response.exit_layer}"
    if not is_same_text(cells["sample_id"], response.sample_id) or not is_same_text(
        cells["exit_layer"], str(response.exit_layer)
    ):
        return f"belongs to {place} but says otherwise: cells were moved; enter the labels into a new file"
    if not is_same_text(cells["text"], response.text):
        return f"({place}) has a different text than the run: cells were moved; enter the labels into a new file"
    return None


def _key(cells: Mapping[str, str]) -> str:
    return cells["row"].strip()


def _label(cell: str) -> str:
    """The label in a cell; empty if it is blank or does not apply."""
    value = cell.strip().lower()
    return "" if value == _NOT_ASKED else value


def _labels_in(path: Path) -> dict[tuple[str, str], str]:
    """The labels that are filled in, by row and measure."""
    found = (
        (_key(cells), measure, _label(cells[measure]))
        for _, cells in read_csv(path, columns=COLUMNS)
        for measure in LABELLED
    )
    return {(key, measure): value for key, measure, value in found if value}


def _check_can_go(path: Path) -> None:
    try:
        labels = _labels_in(path)
    except InputError as error:
        raise RunError(f"{path} exists and is not a label file; choose another name") from error
    if labels:
        raise RunError(f"{path} already has {len(labels)} labels; read them (--read {path}) or choose another name")


def agreements(run: AuditRun, labels: Sequence[Verdict] = ()) -> list[Agreement]:
    """Cohen's kappa of every pair of raters that share a yes-or-no measure, over the kinds that its metric counts.

    Args:
        run: A finished run.
        labels: People's verdicts on some of its answers (`read_labels`), under names that no judge has.
    """
    people = list(dict.fromkeys(label.judge for label in labels))
    table = score_table(run.samples(), run.exit_layers, run.responses(), [*run.verdicts(), *labels])
    return agreements_in(table, run.judges, people=people)
