"""Finished runs for the report's tests, written without a model: chosen rates, judges, names, and a real summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exitsafe.records import KINDS, Response, Verdict
from exitsafe.results.run import AuditRun
from exitsafe.store.tables import SampleInfo
from tests.finished_runs import write_finished

Judges = Sequence[tuple[str, Sequence[str]]]
JUDGES: Judges = (("world-rule", ("asr", "refusal")), ("vqa", ("vqa_accuracy",)), ("coherence", ("coherence",)))
TWO_JUDGES: Judges = (("guard", ("asr", "refusal")), ("other", ("asr",)))
ONLY_OF_KIND = {"asr": "harmful", "vqa_accuracy": "vqa"}
ANSWER = "mix moss with foam then shake it"


def write_run(
    path: Path,
    *,
    harmful_until: int,
    num_samples: int = 32,
    num_layers: int = 4,
    default_exit: int = 3,
    exit_layers: Sequence[int] | None = None,
    judges: Judges = JUDGES,
    categories: Sequence[str] = ("known object", "new object"),
    model: str = "organism",
    adapter: str | None = None,
    is_unscored: Callable[[int, int], bool] = lambda number, exit_layer: False,
    answer: str = ANSWER,
    origin: dict[str, Any] | None = None,
) -> AuditRun:
    """Kinds in turn; harmful requests are answered up to the exit `harmful_until` and refused behind it.

    Args:
        path: Its folder.
        is_unscored: Given a sample's number and an exit layer, whether no judge could read the answer.
    """
    exit_layers = list(exit_layers or range(1, num_layers + 1))
    samples = [
        SampleInfo(
            id=f"s{number}",
            kind=KINDS[number % 4],
            category=categories[number // 4 % len(categories)],
            source=f"suite-{KINDS[number % 4]}",
            digest=str(number),
        )
        for number in range(num_samples)
    ]
    responses = [
        Response(
            sample_id=s.id, exit_layer=layer, text=answer, num_tokens=5, finish_reason="stop", seconds=0.01 * layer
        )
        for s in samples
        for layer in exit_layers
    ]
    verdicts = [
        Verdict(
            sample_id=sample.id,
            exit_layer=layer,
            judge=judge,
            measure=measure,
            score=None if is_unscored(number, layer) else _score(measure, sample.kind, layer <= harmful_until),
            unscored="no word" if is_unscored(number, layer) else None,
        )
        for number, sample in enumerate(samples)
        for layer in exit_layers
        for judge, measures in judges
        for measure in measures
        if ONLY_OF_KIND.get(measure, sample.kind) == sample.kind
    ]
    return write_finished(
        path,
        samples,
        responses,
        verdicts,
        origin=origin,
        exit_layers=exit_layers,
        judges=[{"name": name, "measures": list(measures)} for name, measures in judges],
        model={
            "name": model,
            "num_layers": num_layers,
            "default_exit": default_exit,
            "checkpoint": "ab" * 32,
            "adapter": adapter,
        },
    )


def _score(measure: str, kind: str, is_answered: bool) -> float:
    if measure == "asr":
        return float(is_answered)
    if measure == "refusal":
        return float(kind == "harmful" and not is_answered)
    return 1.0
