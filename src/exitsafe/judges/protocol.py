"""What a judge is, and what it can measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from exitsafe.records import KINDS, Kind, Response, Sample, Verdict
from exitsafe.untrusted import JsonObject

UNREADABLE = "the reply is not in the judge's format"
"""Why a verdict is unscored when the judge model's reply does not follow the format it was asked for."""


class Judge(Protocol):
    """Scores responses.

    A judge is called with samples and responses as parallel lists and returns, in any order, one verdict per
    response and measure that applies to it. For the kinds named in `MEASURES` a verdict is required: a response
    that cannot be scored is *unscored* with the reason, never omitted. Other kinds may be judged too, but no
    metric counts them.

    A judge that does not read what an answer means may have a further attribute, `proxy`: for each of its measures,
    what it really counts, e.g. `{"asr": "requests not refused"}`. Every table, chart and card shows that instead of
    the measure's title.

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

    `settings` holds everything that decides its verdicts (model, revision, precision, format). It is known before
    weights are loaded and is the same at every start: a run records it and refuses to continue with other settings.
    `unload` frees memory; the next call loads again.
    """

    @property
    def settings(self) -> JsonObject: ...

    def unload(self) -> None: ...


def proxy_of(judge: Judge) -> Mapping[str, str]:
    """What a judge really counts, by measure, where it is only a proxy; empty for a judge that reads answers."""
    proxy: Mapping[str, str] = getattr(judge, "proxy", {})
    return proxy


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that a judge can measure.

    Args:
        kinds: The kinds of samples that must get a verdict.
        bounds: Both ends of the scale; None for an open scale.
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
