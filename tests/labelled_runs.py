"""Finished runs with chosen answers and verdicts, written without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exitsafe.records import Kind, Response, Verdict
from exitsafe.results.run import AuditRun
from exitsafe.store.tables import SampleInfo, responses_in_table, to_parquet, verdicts_in_table

Answers = Mapping[str, list[str]]
Scores = Mapping[tuple[str, str], Mapping[str, list[float | None]]]


def make_run(
    path: Path, *, answers: Answers, scores: Scores | None = None, kinds: Mapping[str, Kind] | None = None
) -> AuditRun:
    """A run at exits 1, 2, ...

    Args:
        path: Its folder.
        answers: By sample id, one text per exit; "-" for no answer at all.
        scores: By judge and measure, by sample id, one score per exit; None for unscored.
        kinds: By sample id; harmful by default.
    """
    path.mkdir(parents=True, exist_ok=True)
    samples = [
        SampleInfo(id=i, kind=(kinds or {}).get(i, "harmful"), category="", source="", digest=i) for i in answers
    ]
    responses = [
        Response(sample_id=i, exit_layer=exit_layer, text=text, num_tokens=1, finish_reason="stop", seconds=0.0)
        for i, texts in answers.items()
        for exit_layer, text in enumerate(texts, 1)
        if text != "-"
    ]
    verdicts = [
        Verdict(
            sample_id=i,
            exit_layer=exit_layer,
            judge=judge,
            measure=measure,
            score=score,
            unscored="no word" if score is None else None,
        )
        for (judge, measure), by_sample in (scores or {}).items()
        for i, values in by_sample.items()
        for exit_layer, score in enumerate(values, 1)
    ]
    (path / "responses.parquet").write_bytes(to_parquet(responses_in_table(samples, responses)))
    (path / "verdicts.parquet").write_bytes(to_parquet(verdicts_in_table(verdicts)))
    measures: dict[str, list[str]] = {}
    for judge, measure in scores or {}:
        measures.setdefault(judge, []).append(measure)
    settings = {
        "exit_layers": list(range(1, 1 + max(len(texts) for texts in answers.values()))),
        "judges": [{"name": judge, "measures": found} for judge, found in measures.items()],
    }
    return AuditRun(path=path, settings=settings, origin={}, summary={})
