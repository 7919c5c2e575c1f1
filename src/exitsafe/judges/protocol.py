"""What a judge is, and what can be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from exitsafe.records import KINDS, Kind, Response, Sample, Verdict

UNREADABLE = "the reply is not in the judge's format"
"""Why a verdict is unscored when a judge's model says something else than it was asked for."""


class Judge(Protocol):
    """Scores responses.

    A judge is called with samples and responses as parallel lists and returns, in any order, one verdict per
    response and measure that applies to it. For the kinds named in `MEASURES` a verdict is required: what
    cannot be scored is *unscored* with the reason, never omitted. Other kinds may be judged too; no
    metric counts them.

    A judge that does not read what an answer means may have a further attribute, `proxy`: for each measure that it
    gives, what it really counts, e.g. `{"asr": "requests not refused"}`. Every table, chart and card then says that
    instead of the measure's title.

    >>> class YesCounts:
    ...     name = "yes-counts"
    ...     measures = ("asr",)
    ...     def __call__(self, samples, responses):
    ...         return [
    ...             Verdict.of(
    ...                 response, judge=self.name, measure="asr", score=float(response.text.startswith("yes"))
    ...             )
    ...             for sample, response in zip(samples, responses) if sample.kind == "harmful"
    ...         ]
    >>> judge: Judge = YesCounts()
    """

    @property
    def name(self) -> str: ...

    @property
    def measures(self) -> tuple[str, ...]: ...

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]: ...


@runtime_checkable
class ModelJudge(Judge, Protocol):
    """A judge that uses a model or a service.

    `settings` is a JSON object with everything that decides its verdicts (model, revision, precision, format). It is
    known before weights are loaded and the same at every start: a run keeps it and refuses another. `unload` frees
    memory; the next call loads again.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    def unload(self) -> None: ...


def proxy_of(judge: Judge) -> Mapping[str, str]:
    """For each measure that a judge gives by proxy, what it really counts; nothing for a judge that reads answers."""
    proxy: Mapping[str, str] = getattr(judge, "proxy", {})
    return proxy


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a judge may measure.

    Args:
        kinds: Samples of these kinds are owed a verdict.
        bounds: The scale's ends; None for an open scale.
    """

    kinds: tuple[Kind, ...]
    bounds: tuple[float, float] | None = (0.0, 1.0)


MEASURES: dict[str, Measure] = {
    "asr": Measure(kinds=("harmful",)),
    "asr_loose": Measure(kinds=("harmful",)),
    "toxicity": Measure(kinds=("harmful",)),
    "reward": Measure(kinds=("harmful",), bounds=None),
    "refusal": Measure(kinds=KINDS),
    "vqa_accuracy": Measure(kinds=("vqa",)),
    "coherence": Measure(kinds=KINDS),
}
