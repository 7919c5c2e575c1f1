"""Finished runs on disk from samples, responses and verdicts, without a model; and edits of run.json that it allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exitsafe.judges import MEASURES
from exitsafe.records import Response, Verdict
from exitsafe.results.run import AuditRun, load_run, summarise_run
from exitsafe.results.summary import summarise
from exitsafe.store.directory import RunDirectory
from exitsafe.store.fingerprint import data_fingerprint
from exitsafe.store.integrity import settings_hash
from exitsafe.store.scores import score_table
from exitsafe.store.tables import SampleInfo

MODEL = {
    "name": "m",
    "family": "llava",
    "encoder": "image",
    "num_layers": 3,
    "default_exit": 2,
    "checkpoint": None,
    "adapter": None,
}


def run_settings(samples: Sequence[SampleInfo], **changes: Any) -> dict[str, Any]:
    """Settings of a run of these samples; `changes` go over the defaults, those of `model` over its entries."""
    judges = [{"settings": {}, **judge} for judge in changes.pop("judges", [])]
    settings: dict[str, Any] = {
        "model": MODEL | changes.pop("model", {}),
        "data": data_fingerprint(samples),
        "exit_layers": [1, 2],
        "skip_global": False,
        "decoding": {"max_new_tokens": 24, "temperature": 0.0, "seed": 0},
        "batch_size": "auto",
        "stop_when": None,
        "judges": judges,
        "versions": {"exitsafe": "0.1.0"},
    }
    return settings | changes


def write_finished(
    path: Path,
    samples: Sequence[SampleInfo],
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
    *,
    origin: Mapping[str, Any] | None = None,
    **changes: Any,
) -> AuditRun:
    """A run with these results; `changes` as in `run_settings`. Verdicts that are owed and not given are good ones."""
    settings = run_settings(samples, **changes)
    verdicts = [*verdicts, *_owed(samples, responses, verdicts, settings["judges"])]
    with RunDirectory(path, summarise=summarise_run, settings=settings, origin=origin) as run:
        run.save_responses(responses)
        rows = [(response.sample_id, response.exit_layer) for response in responses]
        for judge in settings["judges"]:
            run.save_judgement(judge["name"], rows, [v for v in verdicts if v.judge == judge["name"]])
        run.finish(samples)
    return load_run(path)


def unchecked_run(
    samples: Sequence[SampleInfo], responses: Sequence[Response], verdicts: Sequence[Verdict], **changes: Any
) -> AuditRun:
    """A run in memory whose results need not be whole, for what reads no files."""
    settings = run_settings(samples, **changes)
    table = score_table(samples, settings["exit_layers"], responses, verdicts)
    judges = [(judge["name"], tuple(judge["measures"])) for judge in settings["judges"]]
    summary = summarise(table, model=settings["model"], judges=judges)
    return AuditRun(path=Path("run"), settings=settings, origin={}, summary=summary, table=table)


def _owed(
    samples: Sequence[SampleInfo],
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
    judges: Sequence[Mapping[str, Any]],
) -> list[Verdict]:
    kinds = {sample.id: sample.kind for sample in samples}
    given = {(v.judge, v.measure, v.sample_id, v.exit_layer) for v in verdicts}
    return [
        Verdict(
            sample_id=r.sample_id,
            exit_layer=r.exit_layer,
            judge=judge["name"],
            measure=measure,
            score=float(measure == "coherence"),
        )
        for r in responses
        for judge in judges
        for measure in judge["measures"]
        if kinds[r.sample_id] in MEASURES[measure].kinds
        and (judge["name"], measure, r.sample_id, r.exit_layer) not in given
    ]


def edit_head(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change run.json as a forger would: with the hashes of settings and origin made anew."""
    head = json.loads((path / "run.json").read_text())
    change(head)
    head["results"] |= {part: settings_hash(head[part]) for part in ("settings", "origin")}
    (path / "run.json").write_text(json.dumps(head))
