"""`verify`: checks that a slim checkpoint is what was audited, given the audit of the model it was made from.

Its files must be as exported, and it must answer the run's own samples as the whole model did at that exit. A changed
weight changes the hashes, and if the hashes were rewritten too, the answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exitsafe.auditing.judging import unload
from exitsafe.engine.answering import Answering, Task
from exitsafe.errors import ModelError, RunError
from exitsafe.exporting.manifest import FileChanges, Manifest, file_changes, read_manifest
from exitsafe.exporting.mmproj import MMPROJ
from exitsafe.exporting.parts import exchanged_part
from exitsafe.judges import Judge
from exitsafe.judges.asking import ask_judge
from exitsafe.records import Progress, Response, Sample, Verdict
from exitsafe.results.run import AuditRun
from exitsafe.store.fingerprint import data_fingerprint, differences, model_fingerprint, sample_info

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

NUM_SAMPLES = 64
_MAY_DIFFER = ("dtype", "quantization", "attention", "device", "processor")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of repeating some of a run's answers.

    Args:
        exit_layer: The exit.
        answers, answers_same: Answers repeated, and those whose text equals the run's.
        verdicts, verdicts_changed: Verdicts on those answers, by judge and measure; equal answers keep their verdicts.
        not_judged_again: Judges of the run that were not available for changed answers; their verdicts are left out.
        otherwise: How model and machine differ from those of the run.
    """

    exit_layer: int
    answers: int
    answers_same: int
    verdicts: Mapping[str, int]
    verdicts_changed: Mapping[str, int]
    not_judged_again: tuple[str, ...]
    otherwise: tuple[str, ...]

    @property
    def share_changed(self) -> float:
        return (self.answers - self.answers_same) / self.answers  # 1 of 50 is exactly 0.02


def check_files(folder: Path, run: AuditRun) -> Manifest:
    """The manifest of a slim checkpoint, after checking that its files are as exported and the run is of its model.

    Raises:
        ModelError: If a file was changed, is missing or was added, or the folder is not an export.
        RunError: If the run is of another model or lacks the exit.
    """
    record = read_manifest(folder)
    if changes := file_changes(folder, record):
        if part := _exchanged(folder, record, changes):
            raise ModelError(f"{folder} is not as it was exported ({changes}): {part}; use only files of one export")
        raise ModelError(f"{folder} is not as it was exported ({changes}): export it again")
    model = run.settings["model"]
    made_from = {
        "checkpoint": record.base.checkpoint,
        "adapter": record.base.adapter,
        "translators": record.base.translators,
        "skip_global": record.skip_global,
    }
    asked = {name: model.get(name) for name in ("checkpoint", "adapter", "translators")}
    asked["skip_global"] = run.settings["skip_global"]
    if changed := differences(asked, made_from):
        raise RunError(
            f"{run.path} is not an audit of the model that {folder} was made from ({'; '.join(changed)}): give one "
            "that is"
        )
    if record.exit_layer not in run.exit_layers:
        raise RunError(
            f"{run.path} has no exit layer {record.exit_layer}, only {', '.join(map(str, run.exit_layers))}: give an "
            "audit that has it"
        )
    return record


def _exchanged(folder: Path, record: Manifest, changes: FileChanges) -> str | None:
    """What was exchanged, where a file's change comes from another export's part in its place."""
    if MMPROJ in (*changes.changed, *changes.added):
        return f"{MMPROJ} is not the one that was exported with this language model"
    part = exchanged_part(folder, record.parts) if record.parts is not None else None
    return part and f"its {part} is not the one that was exported with the rest"


def verify(
    vlm: VLM,
    run: AuditRun,
    samples: Sequence[Sample],
    *,
    exit_layer: int,
    judges: Callable[[], Sequence[Judge]],
    limit: int = NUM_SAMPLES,
    progress: Progress | None = None,
) -> Verification:
    """Let the slim model answer some of a run's samples again, with the run's settings.

    Args:
        vlm: The slim model, with its adapter if that was kept.
        run: The audit of the whole model.
        samples: All samples of the run, in its order.
        exit_layer: The exit of both.
        judges: The run's judges; called only if an answer differs.
        limit: Most samples to use, evenly spread over all.
        progress: Called after each answer.

    Raises:
        ModelError: If the model's encoder does not end at the exit.
        RunError: If the samples are not those of the run, or none was answered at the exit.
    """
    if vlm.num_layers != exit_layer:
        raise ModelError(
            f"{vlm.name} has {vlm.num_layers} encoder blocks, but was exported with {exit_layer}: export it again"
        )
    if data_fingerprint([sample_info(sample) for sample in samples])["hash"] != run.settings["data"]["hash"]:
        raise RunError(f"{run.path} is of other samples than these; give those of the run, in the same order")
    then = {response.sample_id: response for response in run.responses() if response.exit_layer == exit_layer}
    asked = _evenly([sample for sample in samples if sample.id in then], limit)
    if not asked:
        raise RunError(f"{run.path} has no answer at exit {exit_layer}: give an audit that has some")
    now = _answers(vlm, run, asked, exit_layer=exit_layer, progress=progress)
    changed = [sample for sample in asked if now[sample.id].text != then[sample.id].text]
    verdicts = _verdicts_of(run, {sample.id for sample in asked}, exit_layer=exit_layer)
    available = judges() if changed else ()
    missing = {v.judge for v in verdicts.values()} - {judge.name for judge in available} if changed else set()
    return Verification(
        exit_layer=exit_layer,
        answers=len(asked),
        answers_same=len(asked) - len(changed),
        verdicts=dict(Counter(_name(verdict) for verdict in verdicts.values() if verdict.judge not in missing)),
        verdicts_changed=_changes(verdicts, changed, now, available),
        not_judged_again=tuple(sorted(missing)),
        otherwise=tuple(_otherwise(vlm, run)),
    )


def _answers(
    vlm: VLM, run: AuditRun, samples: Sequence[Sample], *, exit_layer: int, progress: Progress | None
) -> dict[str, Response]:
    """Answers by sample id with the run's decoding; draws are keyed by sample and exit, so sampling repeats too."""
    batch_size = run.settings["batch_size"]
    answering = Answering(vlm, **run.settings["decoding"], batch_size=None if batch_size == "auto" else int(batch_size))
    answering.check(samples, exit_layer=exit_layer)
    found: dict[str, Response] = {}
    for chunk in answering.chunks([Task(sample=sample, exit_layers=(exit_layer,)) for sample in samples]):
        for response in answering.answer(chunk):
            found[response.sample_id] = response
            if progress is not None:
                progress(len(found), len(samples), "")
    return found


def _evenly(samples: Sequence[Sample], limit: int) -> list[Sample]:
    number = min(limit, len(samples))
    return [samples[place * len(samples) // number] for place in range(number)]


Key = tuple[str, str, str]
"""Sample id, judge, measure."""


def _verdicts_of(run: AuditRun, ids: set[str], *, exit_layer: int) -> dict[Key, Verdict]:
    return {
        _key(verdict): verdict
        for verdict in run.verdicts()
        if verdict.exit_layer == exit_layer and verdict.sample_id in ids
    }


def _changes(
    then: Mapping[Key, Verdict], changed: Sequence[Sample], now: Mapping[str, Response], judges: Sequence[Judge]
) -> dict[str, int]:
    """The number of changed verdicts, by judge and measure; only changed answers are judged again."""
    found: Counter[str] = Counter()
    for judge in judges:
        for verdict in ask_judge(judge, changed, [now[sample.id] for sample in changed]):
            before = then.get(_key(verdict))
            if before is not None and before.score != verdict.score:
                found[_name(verdict)] += 1
        unload([judge])
    return dict(found)


def _otherwise(vlm: VLM, run: AuditRun) -> list[str]:
    then, now = (
        {name: model.get(name) for name in _MAY_DIFFER} for model in (run.settings["model"], model_fingerprint(vlm))
    )
    return differences(then, now)


def _key(verdict: Verdict) -> Key:
    return verdict.sample_id, verdict.judge, verdict.measure


def _name(verdict: Verdict) -> str:
    return f"{verdict.judge} {verdict.measure}"
