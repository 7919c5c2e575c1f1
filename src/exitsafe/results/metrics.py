"""The metrics of a summary, one record each: what is measured on which samples, its title, and its format.

Terminal, page, gate and model card take titles and formats from here, so that names and values, also those of a proxy
judge, are written the same everywhere. `numbers.py` formats values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exitsafe.judges import MEASURES
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.records import KINDS, Kind
from exitsafe.store.scores import OWN
from exitsafe.untrusted import JsonObject

Direction = Literal["lower", "higher"] | None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How a value is written.

    Args:
        digits: Decimals; None for three significant digits.
        is_percent: Whether values are in percent, and changes in percentage points.
    """

    digits: int | None
    is_percent: bool = False


PERCENT = Unit(digits=1, is_percent=True)
FRACTION = Unit(digits=3)
NUMBER = Unit(digits=2)
SECONDS = Unit(digits=None)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of every result.

    Args:
        name: As in summary.json.
        title: Its name in tables and charts, for a judge that reads the answer.
        meaning: What it counts or averages.
        unit: How its values are written.
        direction: Which direction is better; None if neither is.
        measure: The judge's measure, or `tokens` or `seconds`, which the audit itself counts.
        kinds: Only samples of these kinds count.
        aggregate: The name in arXiv 2411.04291 of its mean over a bin's layers, and over the three bins.
    """

    name: str
    title: str
    meaning: str
    unit: Unit
    direction: Direction
    measure: str
    kinds: tuple[Kind, ...]
    aggregate: str | None

    @property
    def is_own(self) -> bool:
        """Whether the audit itself measures it, not a judge."""
        return self.measure not in MEASURES

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the scale; None for an open scale."""
        return None if self.is_own else MEASURES[self.measure].bounds


def _metric(
    name: str,
    title: str,
    meaning: str,
    direction: Direction = None,
    *kinds: Kind,
    measure: str = "",
    unit: Unit = PERCENT,
    aggregate: str | None = None,
) -> Metric:
    measure = measure or name
    return Metric(
        name=name,
        title=title,
        meaning=meaning,
        unit=unit,
        direction=direction,
        measure=measure,
        kinds=kinds or (MEASURES[measure].kinds if measure in MEASURES else KINDS),
        aggregate=aggregate,
    )


# fmt: off
METRICS: tuple[Metric, ...] = (
    _metric("asr", "Attack success", "harmful requests that got a harmful answer", "lower", aggregate="AASR"),
    _metric("asr_loose", "Attack success, loose",
            "harmful requests that got a harmful answer or one that the judge calls controversial", "lower"),
    _metric("toxicity", "Toxicity", "mean score of answers to harmful requests", "lower",
            unit=FRACTION, aggregate="ATS"),
    _metric("reward", "Reward", "mean score of answers to harmful requests, on the reward model's own scale", "higher",
            unit=NUMBER, aggregate="ATR"),
    _metric("refusal", "Refusal", "requests of every kind that were refused; only refusing harmful ones is good"),
    _metric("over_refusal", "Over-refusal", "requests that look harmful and should be answered, but were refused",
            "lower", "borderline", measure="refusal"),
    _metric("benign_refusal", "Benign refusal", "harmless requests that were refused",
            "lower", "benign", measure="refusal"),
    _metric("vqa_accuracy", "VQA accuracy", "picture questions that were answered correctly", "higher"),
    _metric("coherence", "Coherence", "answers that are not empty, repetitive or degenerate", "higher"),
    _metric("tokens", "Tokens per answer", "mean length of an answer", unit=NUMBER),
    _metric("seconds", "Seconds per answer",
            "an answer's mean share of the time of its batches; a rough guide only", unit=SECONDS),
)
# fmt: on

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
"""The metrics by name; for a title that depends on a run's judge use `AuditRun.title`."""

NO_PROXY: Mapping[str, str] = {}
_PROXIES = {RefusalPrefix.name: RefusalPrefix.proxy}

AGGREGATES = {metric.name: metric.aggregate for metric in METRICS if metric.aggregate is not None}
"""The paper's names for the means over bins."""


def judge_of(metric: Metric, measures: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """The judge that reports a metric: the first, in the order given, that has its measure; None if none has.

    Args:
        metric: The metric.
        measures: Judges' names with their measures.
    """
    if metric.is_own:
        return OWN
    return next((name for name, known in measures if metric.measure in known), None)


def proxies_in(judges: Sequence[JsonObject]) -> dict[str, Mapping[str, str]]:
    """By name, the proxies among the judges of a run's settings: for each measure, what the judge really counts.

    The built-in proxy is recognised by its name, whatever a run's settings say.
    """
    found = {judge["name"]: _PROXIES.get(judge["name"]) or judge.get("proxy", NO_PROXY) for judge in judges}
    return {name: counted for name, counted in found.items() if counted}


def title_of(metric: Metric, proxy: Mapping[str, str] = NO_PROXY) -> str:
    """A metric's title; for a proxy judge, what it counts instead.

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
    """What a metric's value means, and which direction is better.

    >>> meaning_of(BY_NAME["asr"])
    'harmful requests that got a harmful answer; lower is better'
    >>> meaning_of(BY_NAME["asr"], {"asr": "requests not refused"})
    'requests not refused, whatever the answer says: a proxy; lower is better'
    """
    counted = proxy.get(metric.measure)
    meaning = metric.meaning if counted is None else f"{counted}, whatever the answer says: a proxy"
    return meaning if metric.direction is None else f"{meaning}; {metric.direction} is better"


def as_noun(title: str) -> str:
    """A title for use inside a sentence.

    >>> as_noun("Attack success"), as_noun("VQA accuracy"), as_noun("Requests not refused (proxy)")
    ('attack success', 'VQA accuracy', 'the rate of requests not refused (proxy)')
    """
    is_name = title[:2].isupper()
    lower = title if is_name else title[:1].lower() + title[1:]
    return f"the rate of {lower}" if lower.startswith(("requests ", "answers ")) else lower


def as_opening(title: str) -> str:
    """A title for the start of a sentence.

    >>> as_opening("Requests not refused (proxy)")
    'The rate of requests not refused (proxy)'
    """
    noun = as_noun(title)
    return noun[:1].upper() + noun[1:]
