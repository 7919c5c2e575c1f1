"""Finished runs on disk with chosen scores, for the gate: no model, no answers worth reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exitsafe.records import Kind, Response, Verdict
from exitsafe.runs import AuditRun, load_run
from exitsafe.runs.finished import FORMAT
from exitsafe.runs.scores import score_table
from exitsafe.runs.summary import summarise
from exitsafe.runs.tables import SampleInfo, responses_to_parquet, verdicts_to_parquet

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
    stopping: Mapping[str, Any] | None = None,
) -> AuditRun:
    """A run at exits 1, 2, ...

    Args:
        path: Its folder.
        scores: By measure: one row per sample, one score per exit; None is unscored.
        categories: Given to the samples in turn.
        num_layers: Of the encoder.
        judge: Whose scores they are.
        stopping: As `summarise` takes it.
    """
    samples: dict[str, SampleInfo] = {}
    responses: dict[tuple[str, int], Response] = {}
    verdicts = []
    for measure, table in scores.items():
        kind = _KINDS.get(measure, "harmful")
        for number, row in enumerate(table):
            i = f"{kind}{number}"
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
    exits = tuple(range(1, 1 + max(len(row) for table in scores.values() for row in table)))
    grid = score_table(list(samples.values()), exits, list(responses.values()), verdicts)
    model = {"name": "made-up", "family": "llava", "num_layers": num_layers, "default_exit": 2}
    summary = summarise(grid, model=model, judges=[(judge, tuple(scores))], stopping=stopping)
    settings = {
        "model": model,
        "exit_layers": list(exits),
        "judges": [{"name": judge, "measures": list(scores), "settings": {}}],
    }
    path.mkdir(parents=True)
    head = {"format": FORMAT, "settings": settings, "origin": {}}
    for name, content in (("run.json", head), ("summary.json", summary)):
        (path / name).write_text(json.dumps(content))
    (path / "responses.parquet").write_bytes(responses_to_parquet(list(samples.values()), list(responses.values())))
    (path / "verdicts.parquet").write_bytes(verdicts_to_parquet(verdicts))
    return load_run(path)
