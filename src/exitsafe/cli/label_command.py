"""`exitsafe label`: a finished run -> a file for people to label; their labels -> agreement with the judges.

Nothing printed holds texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.errors import ExitsafeError, InputError
from exitsafe.show.table import Table
from exitsafe.specs.verbs import LabelSpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.records import Verdict
    from exitsafe.results.run import AuditRun

_MOST_FAULTS = 20  # that are shown
_LABELS = ("yes", "no", "unsure")


def label_command(spec: LabelSpec, show: console.Show) -> None:
    """Let people label some answers of a run, and measure how far its judges agree with them and with each other.

    Run it once without --read to write RUN/labels.csv, fill that in with any spreadsheet, then run it with --read.
    """
    from exitsafe.results.run import load_run

    run = load_run(spec.run)
    if spec.read:
        document = read_files(run, spec.read)
        show(document, lambda: [_agreement_table(document)])
        return
    out = spec.out or spec.run / "labels.csv"
    document = write_file(run, rows=spec.rows, seed=spec.seed, out=out, may_leave_run=spec.include_unsafe_text)
    show(document, lambda: _what_to_do(document))


def write_file(run: AuditRun, *, rows: int, seed: int, out: Path, may_leave_run: bool) -> JsonObject:
    """Draw the answers and write the file to be filled.

    Raises:
        InputError: If the file would lie outside the run without leave.
        RunError: If the file is there and holds labels or something else.
    """
    from exitsafe.results.labels import draw_rows, write_labels

    if not may_leave_run and run.path.resolve() not in out.resolve().parents:
        raise InputError(
            f"{out} lies outside the run and would hold requests and answers, harmful ones too: leave --out away, or "
            "give --include-unsafe-text"
        )
    chosen = draw_rows(run, num_rows=rows, seed=seed)
    ids = {sample_id for sample_id, _ in chosen}
    prompts = _read_prompts(run, ids)
    if len(prompts) < len(ids):
        console.note(
            f"the requests of {len(ids) - len(prompts)} of {len(ids)} samples could not be had again and are blank: "
            "look them up by sample_id, or start where the suites of the audit are"
        )
    write_labels(out, run, chosen, prompts=prompts)
    return {
        "run": str(run.path),
        "file": str(out),
        "rows": len(chosen),
        "samples": len(ids),
        "samples_without_request": len(ids) - len(prompts),
        "exit_layers": {str(layer): n for layer, n in sorted(Counter(layer for _, layer in chosen).items())},
    }


def read_files(run: AuditRun, files: Sequence[Path]) -> JsonObject:
    """Check and store the files, one per rater, and compare them with the judges.

    Raises:
        InputError: If a file has a fault, comes twice or holds no label; nothing is stored then.
        RunError: If the run has other labels already.
    """
    from exitsafe.results.labels import HUMAN, agreements, store_labels

    if len({file.resolve() for file in files}) < len(files):
        raise InputError("a file is given twice to --read; each rater fills a copy of one's own")
    raters = [HUMAN if number == 1 else f"{HUMAN}-{number}" for number in range(1, len(files) + 1)]
    verdicts = {rater: _read_sound(file, run, rater) for file, rater in zip(files, raters, strict=True)}
    stored = [store_labels(file, run, number=number) for number, file in enumerate(files, 1)]
    pairs = agreements(run, [verdict for found in verdicts.values() for verdict in found])
    return {
        "run": str(run.path),
        "labels": [
            {"rater": rater, "file": str(file), "stored": str(kept), **_counts(verdicts[rater])}
            for rater, file, kept in zip(raters, files, stored, strict=True)
        ],
        "agreements": [pair.to_dict() for pair in pairs],
    }


def _read_sound(file: Path, run: AuditRun, rater: str) -> Sequence[Verdict]:
    from exitsafe.results.labels import read_labels

    labels = read_labels(file, run, rater=rater)
    if len(labels.faults) == 1:
        raise InputError(f"{file}: {labels.faults[0]}; nothing was stored")
    if labels.faults:
        for fault in labels.faults[:_MOST_FAULTS]:
            console.note(f"{file}: {fault}")
        raise InputError(f"{file} has {len(labels.faults)} faults: mend them and read it again; nothing was stored")
    if not labels.verdicts:
        raise InputError(f"{file} holds no label; fill the columns asr and refusal with yes, no or unsure")
    return labels.verdicts


def _read_prompts(run: AuditRun, ids: set[str]) -> dict[str, str]:
    """Requests by sample id, of those samples that can be read again and are still what the run asked."""
    from exitsafe.data.source import source_of
    from exitsafe.store.fingerprint import sample_info

    if not run.origin.get("suites"):  # the audit was given samples, not suites
        return {}
    digests = {sample.id: sample.digest for sample in run.samples()}
    try:
        samples = [sample for sample in source_of(run.origin).read() if sample.id in ids]
        return {sample.id: sample.prompt for sample in samples if sample_info(sample).digest == digests[sample.id]}
    except ExitsafeError as error:
        console.note(f"the requests cannot be read again: {error}")
        return {}


def _counts(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    return {
        measure: {label: sum((v.measure, v.label) == (measure, label) for v in verdicts) for label in _LABELS}
        for measure in ("asr", "refusal")
    }


def _what_to_do(document: JsonObject) -> list[Any]:
    return [
        f"{document['rows']} answers to label: {document['file']} (requests and answers: readable by you only)",
        "Fill its columns asr and refusal with yes, no or unsure, in any spreadsheet, before you look at any verdict.",
        f"Then: exitsafe label {document['run']} --read {document['file']}",
    ]


def _agreement_table(document: JsonObject) -> Table:
    from exitsafe.results.numbers import percent
    from exitsafe.show.tables import agreement_table

    notes = ["A judge's score from 0.5 on counts as yes. Labelled answers are weighted to stand for the whole run."]
    covered = [pair["covered"] for pair in document["agreements"] if pair["covered"] is not None]
    if partial := [share for share in covered if share < 1]:
        notes.append(
            f"Labels represent at least {percent(min(partial))} of the answers: unlabelled verdict groups are left out."
        )
    stored = ", ".join(entry["stored"] for entry in document["labels"])
    return replace(agreement_table(document["agreements"]), notes=(*notes, f"Labels: {stored}"))
