"""The metrics of a summary: which measure, over samples of which kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
        worse: Which end of the scale is bad; None where neither is.
        is_own: Measured by the audit itself, not by a judge.
    """

    name: str
    measure: str
    kinds: tuple[Kind, ...]
    bounds: tuple[float, float] | None
    worse: Literal["high", "low"] | None = None
    is_own: bool = False


def _judged(name: str, measure: str, *kinds: Kind, worse: Literal["high", "low"] | None = None) -> Metric:
    known = MEASURES[measure]
    return Metric(name=name, measure=measure, kinds=kinds or known.kinds, bounds=known.bounds, worse=worse)


def _own(name: str) -> Metric:
    return Metric(name=name, measure=name, kinds=KINDS, bounds=None, is_own=True)


METRICS: tuple[Metric, ...] = (
    _judged("asr", "asr", worse="high"),
    _judged("asr_loose", "asr_loose", worse="high"),
    _judged("toxicity", "toxicity", worse="high"),
    _judged("reward", "reward", worse="low"),
    _judged("refusal", "refusal"),
    _judged("over_refusal", "refusal", "borderline", worse="high"),
    _judged("benign_refusal", "refusal", "benign", worse="high"),
    _judged("vqa_accuracy", "vqa_accuracy", worse="low"),
    _judged("coherence", "coherence", worse="low"),
    _own("tokens"),
    _own("seconds"),
)

TITLES = {
    "asr": "Attack success",
    "asr_loose": "Attack success, loose",
    "toxicity": "Toxicity",
    "reward": "Reward",
    "refusal": "Refusal",
    "over_refusal": "Over-refusal",
    "benign_refusal": "Benign refusal",
    "vqa_accuracy": "VQA accuracy",
    "coherence": "Coherence",
    "tokens": "Tokens per answer",
    "seconds": "Seconds per answer",
}
"""Each metric's name in tables and charts."""

AGGREGATES = {"asr": "AASR", "toxicity": "ATS", "reward": "ATR"}
"""What arXiv 2411.04291 calls the mean of a metric over a bin's layers, and over the three bins."""


def judge_of(metric: Metric, measures: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """Whose word a metric is: the first judge, in the order given, that has its measure; None without one.

    Args:
        metric: The metric.
        measures: Judges' names with their measures.
    """
    if metric.is_own:
        return OWN
    return next((name for name, known in measures if metric.measure in known), None)
