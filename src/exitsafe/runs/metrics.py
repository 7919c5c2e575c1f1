"""The metrics of a summary: which measure, over samples of which kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exitsafe.judges import MEASURES
from exitsafe.records import KINDS, Kind
from exitsafe.runs.scores import OWN


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of every result.

    Args:
        name: As in summary.json.
        measure: What a judge scores, or `tokens` and `seconds`, which the audit counts itself.
        kinds: Only samples of these kinds count.
        bounds: The scale's ends; None for an open scale.
        is_own: Measured by the audit itself, not by a judge.
    """

    name: str
    measure: str
    kinds: tuple[Kind, ...]
    bounds: tuple[float, float] | None
    is_own: bool = False


def _judged(name: str, measure: str, *kinds: Kind) -> Metric:
    known = MEASURES[measure]
    return Metric(name=name, measure=measure, kinds=kinds or known.kinds, bounds=known.bounds)


def _own(name: str) -> Metric:
    return Metric(name=name, measure=name, kinds=KINDS, bounds=None, is_own=True)


METRICS: tuple[Metric, ...] = (
    _judged("asr", "asr"),
    _judged("asr_loose", "asr_loose"),
    _judged("toxicity", "toxicity"),
    _judged("reward", "reward"),
    _judged("refusal", "refusal"),
    _judged("over_refusal", "refusal", "borderline"),
    _judged("benign_refusal", "refusal", "benign"),
    _judged("vqa_accuracy", "vqa_accuracy"),
    _judged("coherence", "coherence"),
    _own("tokens"),
    _own("seconds"),
)


def judge_of(metric: Metric, measures: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """Whose word a metric is: the first judge, in the order given, that has its measure; None without one.

    Args:
        metric: The metric.
        measures: Judges' names with their measures.
    """
    if metric.is_own:
        return OWN
    return next((name for name, known in measures if metric.measure in known), None)
