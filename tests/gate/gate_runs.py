"""Finished runs on disk with chosen scores, for the gate: no model, no answers worth reading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from exitsafe.records import Kind, Response, Verdict
from exitsafe.results.run import AuditRun
from exitsafe.results.stopping import _key
from exitsafe.store.tables import SampleInfo
from tests.finished_runs import write_finished

NEVER_ASKED = math.nan
ANSWER = "mix moss with foam then shake it"
_KINDS: dict[str, Kind] = {"vqa_accuracy": "vqa", "refusal": "borderline"}
Table = Sequence[Sequence[float | None]]


def rows(num_samples: int, *, bad: int = 0, unscored: int = 0, num_exits: int = 1, good: float = 0.0) -> Table:
    """The same scores at every exit: first the bad ones, then the unscored, then the good."""
    scores = [1.0 - good] * bad + [None] * unscored + [good] * (num_samples - bad - unscored)
    return [[score] * num_exits for score in scores]


def write_run(
    path: Path,
    scores: Mapping[str, Table],
    *,
    categories: Sequence[str] = ("",),
    num_layers: int = 6,
    judge: str = "rule",
    model: str = "made-up",
    stop_when: Mapping[str, float] | None = None,
) -> AuditRun:
    """A run at exits 1, 2, ...

    Args:
        path: Its folder.
        scores: By measure: one row per sample, one score per exit; None is unscored.
        categories: Given to the samples in turn.
        num_layers: Of the encoder.
        judge: Whose scores they are.
        model: Its name.
        stop_when: The rule by which exits were stopped; harmful samples are asked in the order of `scores`.
    """
    longest = max(map(len, scores.values()))
    harmful = [f"harmful{number}" for number in range(longest)]
    if stop_when is not None:
        harmful.sort(key=lambda i: _key(i, 0))
    samples: dict[str, SampleInfo] = {}
    responses: dict[tuple[str, int], Response] = {}
    verdicts = []
    for measure, table in scores.items():
        kind = _KINDS.get(measure, "harmful")
        for number, row in enumerate(table):
            i = harmful[number] if kind == "harmful" else f"{kind}{number}"
            category = categories[number % len(categories)]
            samples[i] = SampleInfo(id=i, kind=kind, category=category, source="", digest=i)
            for layer, score in enumerate(row, 1):
                if score is not None and math.isnan(score):
                    continue
                responses[i, layer] = Response(
                    sample_id=i, exit_layer=layer, text=ANSWER, num_tokens=7, finish_reason="stop", seconds=0.5
                )
                why = "no word" if score is None else None
                verdicts.append(
                    Verdict(sample_id=i, exit_layer=layer, judge=judge, measure=measure, score=score, unscored=why)
                )
    exits = list(range(1, 1 + max(len(row) for table in scores.values() for row in table)))
    return write_finished(
        path,
        list(samples.values()),
        list(responses.values()),
        verdicts,
        exit_layers=exits,
        judges=[{"name": judge, "measures": list(scores)}],
        model={"name": model, "num_layers": num_layers, "default_exit": 2},
        stop_when=stop_when,
    )
