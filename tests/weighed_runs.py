"""Finished runs with as many successes as a test wants, and latencies with chosen times; no model, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from exitsafe.engine.latency import Latency, Pass
from exitsafe.records import Kind
from exitsafe.results.run import AuditRun
from exitsafe.results.stopping import Stopping
from exitsafe.results.summary import summarise
from tests.labelled_runs import make_run

Scores = Sequence[Sequence[float | None]]
"""By exit, one score per sample; None for unscored."""


def make_weighed(
    path: Path,
    *,
    asr: Scores | None = None,
    vqa: Scores | None = None,
    refused: Scores | None = None,
    default_exit: int = 1,
    num_layers: int | None = None,
    stopping: Stopping | None = None,
) -> AuditRun:
    """A run at exits 1, 2, ...

    Args:
        path: Its folder.
        asr, vqa, refused: Scores of harmful, vqa and borderline samples.
        default_exit: Of its model.
        num_layers: Blocks of its model; as many as exits by default.
        stopping: As in a summary: which exits stopped.
    """
    answers: dict[str, list[str]] = {}
    kinds: dict[str, Kind] = {}
    scores: dict[tuple[str, str], dict[str, list[float | None]]] = {}
    parts: list[tuple[Kind, tuple[str, str], Scores | None]] = [
        ("harmful", ("rule", "asr"), asr),
        ("borderline", ("rule", "refusal"), refused),
        ("vqa", ("vqa", "vqa_accuracy"), vqa),
    ]
    for kind, place, by_exit in parts:
        for number, values in enumerate(zip(*(by_exit or []), strict=True)):
            sample = f"{kind}-{number}"
            kinds[sample], answers[sample] = kind, ["."] * len(values)
            scores.setdefault(place, {})[sample] = list(values)
    run = make_run(path, answers=answers, scores=scores, kinds=kinds)
    layers = num_layers or len(run.exit_layers)
    model = {"name": "made-up", "family": "llava", "num_layers": layers, "default_exit": default_exit}
    settings = {**run.settings, "skip_global": False, "model": model}
    judges = [("rule", ("asr", "refusal")), ("vqa", ("vqa_accuracy",))]
    settings["judges"] = [{"name": name, "measures": list(measures)} for name, measures in judges]
    run = replace(run, settings=settings)
    return replace(run, summary=summarise(run.score_table(), model=model, judges=judges, stopping=stopping))


def rate(successes: int, n: int) -> list[float | None]:
    """So many ones of n."""
    return [*[1.0] * successes, *[0.0] * (n - successes)]


def make_latency(encoder: Mapping[int, float], *, default: int, num_passes: int = 24, drift: float = 0.0) -> Latency:
    """Passes of so many milliseconds in the encoder, 10 in the prefill, 1 a token; each is slower by `drift`."""

    def passes(milliseconds: float) -> tuple[Pass, ...]:
        return tuple(
            Pass(
                encoder_ms=milliseconds * (1 + drift * number),
                prefill_ms=10.0 * (1 + drift * number),
                decode_ms_per_token=1 + drift * number,
            )
            for number in range(num_passes)
        )

    return Latency(
        default=passes(encoder[default]), exits={layer: passes(milliseconds) for layer, milliseconds in encoder.items()}
    )
