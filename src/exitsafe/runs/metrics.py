"""The metrics of a summary: which measure, over samples of which kinds, and what each is called in all output.

Terminal, page, gate and model card take titles from here, so that what a proxy judge counts is called the same
everywhere. `numbers.py` formats values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exitsafe.judges import MEASURES
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.records import KINDS, Kind
from exitsafe.runs.scores import OWN

Unit = Literal["percent", "fraction", "number", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of every result.

    Args:
        name: As in summary.json.
        measure: What a judge scores, or `tokens` and `seconds`, which the audit counts itself.
        kinds: Only samples of these kinds count.
        bounds: The scale's ends; None for an open scale.
        title: Its name in tables and charts, from a judge that reads the answer.
        meaning: What it counts or averages.
        unit: How its values are written: a percentage, a mean from 0 to 1, another number, or seconds.
        worse: Which end of the scale is bad; None where neither is.
        is_own: Measured by the audit itself, not by a judge.
    """

    name: str
    measure: str
    kinds: tuple[Kind, ...]
    bounds: tuple[float, float] | None
    title: str
    meaning: str
    unit: Unit = "percent"
    worse: Literal["high", "low"] | None = None
    is_own: bool = False


def _judged(
    name: str,
    measure: str,
    *kinds: Kind,
    title: str,
    meaning: str,
    worse: Literal["high", "low"] | None = None,
    unit: Unit = "percent",
) -> Metric:
    known = MEASURES[measure]
    return Metric(
        name=name,
        measure=measure,
        kinds=kinds or known.kinds,
        bounds=known.bounds,
        title=title,
        meaning=meaning,
        unit=unit,
        worse=worse,
    )


def _own(name: str, *, title: str, meaning: str, unit: Unit) -> Metric:
    return Metric(
        name=name, measure=name, kinds=KINDS, bounds=None, title=title, meaning=meaning, unit=unit, is_own=True
    )


METRICS: tuple[Metric, ...] = (
    _judged("asr", "asr", title="Attack success", meaning="harmful requests that got a harmful answer", worse="high"),
    _judged(
        "asr_loose",
        "asr_loose",
        title="Attack success, loose",
        meaning="harmful requests that got a harmful answer or one that the judge calls controversial",
        worse="high",
    ),
    _judged(
        "toxicity",
        "toxicity",
        title="Toxicity",
        meaning="mean score of answers to harmful requests",
        worse="high",
        unit="fraction",
    ),
    _judged(
        "reward",
        "reward",
        title="Reward",
        meaning="mean score of answers to harmful requests, on the reward model's own scale",
        worse="low",
        unit="number",
    ),
    _judged(
        "refusal",
        "refusal",
        title="Refusal",
        meaning="requests of every kind that were refused; only refusing harmful ones is good",
    ),
    _judged(
        "over_refusal",
        "refusal",
        "borderline",
        title="Over-refusal",
        meaning="requests that look harmful and should be answered, but were refused",
        worse="high",
    ),
    _judged(
        "benign_refusal",
        "refusal",
        "benign",
        title="Benign refusal",
        meaning="harmless requests that were refused",
        worse="high",
    ),
    _judged(
        "vqa_accuracy",
        "vqa_accuracy",
        title="VQA accuracy",
        meaning="picture questions that were answered correctly",
        worse="low",
    ),
    _judged(
        "coherence",
        "coherence",
        title="Coherence",
        meaning="answers that are not empty, repetitive or degenerate",
        worse="low",
    ),
    _own("tokens", title="Tokens per answer", meaning="mean length of an answer", unit="number"),
    _own(
        "seconds",
        title="Seconds per answer",
        meaning="an answer's mean share of the time of its batches; a rough guide only",
        unit="seconds",
    ),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
TITLES = {metric.name: metric.title for metric in METRICS}
"""Each metric's title where no judge is known; with a run use `AuditRun.title`, which follows its judge."""

NO_PROXY: Mapping[str, str] = {}
_PROXIES = {RefusalPrefix.name: RefusalPrefix.proxy}

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


def proxies_in(judges: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, str]]:
    """By name, the proxies among the judges of a run's settings: for each measure, what the judge really counts.

    The built-in proxy is known by its name, whatever a run says.
    """
    found = {judge["name"]: _PROXIES.get(judge["name"]) or judge.get("proxy", NO_PROXY) for judge in judges}
    return {name: counted for name, counted in found.items() if counted}


def title_of(metric: Metric, proxy: Mapping[str, str] = NO_PROXY) -> str:
    """A metric's title, by what a proxy judge counts in its place.

    >>> title_of(BY_NAME["asr"]), title_of(BY_NAME["asr"], {"asr": "requests not refused"})
    ('Attack success', 'Requests not refused (proxy)')
    >>> title_of(BY_NAME["over_refusal"], {"refusal": "answers that open with a known refusal"})
    'Over-refusal (proxy)'
    """
    counted = proxy.get(metric.measure)
    if counted is None:
        return metric.title
    title = counted[:1].upper() + counted[1:] if metric.name == metric.measure else metric.title
    return f"{title} (proxy)"


def meaning_of(metric: Metric, proxy: Mapping[str, str] = NO_PROXY) -> str:
    """What a metric's value says, and which direction is better.

    >>> meaning_of(BY_NAME["asr"])
    'harmful requests that got a harmful answer; lower is better'
    >>> meaning_of(BY_NAME["asr"], {"asr": "requests not refused"})
    'requests not refused, whatever the answer says: a proxy; lower is better'
    """
    counted = proxy.get(metric.measure)
    meaning = metric.meaning if counted is None else f"{counted}, whatever the answer says: a proxy"
    return (
        meaning if metric.worse is None else f"{meaning}; {'lower' if metric.worse == 'high' else 'higher'} is better"
    )


def as_noun(title: str) -> str:
    """A title inside a sentence.

    >>> as_noun("Attack success"), as_noun("VQA accuracy"), as_noun("Requests not refused (proxy)")
    ('attack success', 'VQA accuracy', 'the rate of requests not refused (proxy)')
    """
    is_name = title[:2].isupper()
    lower = title if is_name else title[:1].lower() + title[1:]
    return f"the rate of {lower}" if lower.startswith(("requests ", "answers ")) else lower


def as_opening(title: str) -> str:
    """A title that opens a sentence.

    >>> as_opening("Requests not refused (proxy)")
    'The rate of requests not refused (proxy)'
    """
    noun = as_noun(title)
    return noun[:1].upper() + noun[1:]
