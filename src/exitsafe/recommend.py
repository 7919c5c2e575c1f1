"""Which exits are safe, useful and cheap enough: a finished run, times and savings in; points, the Pareto set and a
recommendation out. Measures nothing, loads no model and writes no file.

Choosing among many exits by their bounds errs more often than a single bound does, so every bound here has the level
0.05 / (exits x kinds of bound): with 95% confidence all of them hold at once, whatever limits are tried.
docs/recommend.md explains every number, docs/statistics.md#limits the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from exitsafe.engine.latency import Latency, Pass
from exitsafe.errors import InputError, RunError
from exitsafe.results.costs import Savings
from exitsafe.results.limits import Bounded, Bounds, Level, bounds_of
from exitsafe.results.metrics import BY_NAME, Metric, judge_of
from exitsafe.results.run import AuditRun
from exitsafe.specs.verbs import Limits
from exitsafe.stats.medians import median_interval, median_upper_bound

HARDLY = 0.1
"""Early exit that saves a smaller share of an answer does not make a model noticeably faster."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """The median of measured milliseconds (or a share), with its distribution-free 95% interval."""

    median: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Times:
    """One request alone at an exit; `bound` is the answer's upper bound, None where the passes are too few for one."""

    encoder_ms: Time
    prefill_ms: Time
    decode_ms_per_token: Time
    answer_ms: Time
    saved_share: Time
    """Of the answer at the default exit, pass by pass."""
    bound: float | None


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that an exit's bound does not satisfy.

    `samples_needed`: about how many answers at the measured rate would satisfy it; None if more would not help.
    """

    limit: str
    allowed: float
    bound: float | None
    samples_needed: int | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One exit layer."""

    exit_layer: int
    metrics: dict[str, Bounded]
    times: Times | None
    flops_saved: int | None
    flops_saved_share: float | None
    bytes_saved: int | None
    is_pareto: bool
    misses: tuple[Miss, ...]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """All exits audited, the best of them, and the one to ship.

    Attributes:
        titles: The title of each metric, which depends on its judge.
        cautions: What to know before reading the run's numbers.
        recommended: The cheapest exit that satisfies every limit; None if there is none, or no limit is set.
        nearest: If none does, the exit that comes closest.
        num_bounds: Bounds that hold at once with `confidence`.
        encoder_share: Of the time or work before the first token at the default exit, `measured` and `counted`.
        most_saved: The share of an answer that the shallowest audited exit saves, `measured` and `counted`.
    """

    run: str
    model: str
    num_layers: int
    default_exit: int
    skip_global: bool
    judge: str
    titles: dict[str, str]
    cautions: tuple[str, ...]
    confidence: float
    num_bounds: int
    num_answer_tokens: int
    num_passes: int
    is_prompt_measured: bool | None
    model_bytes: int | None
    has_stopped: bool
    limits: Limits
    points: tuple[Point, ...]
    recommended: int | None
    nearest: int | None
    encoder_share: dict[str, float]
    most_saved: dict[str, float]

    @property
    def pareto(self) -> tuple[int, ...]:
        """Exits that no cheaper exit equals or beats in every bound."""
        return tuple(point.exit_layer for point in self.points if point.is_pareto)

    @property
    def qualifying(self) -> tuple[int, ...]:
        """Exits that satisfy every limit; empty without limits."""
        return tuple(point.exit_layer for point in self.points if self.limits.given and not point.misses)

    @property
    def hardly_saves(self) -> bool | None:
        """Whether early exit hardly makes answers faster: by measured times where they are conclusive, else by counted
        operations; None if nothing is known or nothing cheaper than the untouched model was audited."""
        if self.points[0].exit_layer >= self.default_exit and not self.skip_global:
            return None
        times = self.points[0].times
        if times is not None:
            saved = times.saved_share
            if saved.high is not None and saved.high < HARDLY:
                return True
            if saved.low is not None and saved.low >= HARDLY:
                return False
        share = self.most_saved.get("counted", self.most_saved.get("measured"))
        return None if share is None else share < HARDLY

    def at(self, exit_layer: int) -> Point:
        """The point of an exit."""
        return next(point for point in self.points if point.exit_layer == exit_layer)

    def to_dict(self) -> dict[str, object]:
        """As one JSON object."""
        return {
            **asdict(self),
            "limits": self.limits.model_dump(),
            "pareto": list(self.pareto),
            "qualifying": list(self.qualifying),
            "hardly_saves": self.hardly_saves,
        }


def recommend(
    run: AuditRun,
    latency: Latency | None = None,
    savings: Savings | None = None,
    *,
    limits: Limits | None = None,
    num_answer_tokens: int = 64,
) -> Recommendation:
    """Weigh safety, usefulness and cost of every audited exit, and choose.

    A deeper exit always costs more, since it does the work of every shallower one; times that say otherwise are noise.

    Args:
        run: A finished audit with attack success.
        latency: Measured times of its model; needed for `max_ms`.
        savings: What was counted of its model.
        limits: What an exit must satisfy; without any, nothing is recommended.
        num_answer_tokens: Length of the answer whose time is weighed.

    Raises:
        RunError: If the run has no attack success.
        InputError: If a limit is on what the run has not measured.
    """
    limits = limits or Limits()
    check_limits(run, limits, has_latency=latency is not None)
    metrics = bounded_metrics(run)
    level = Level(num_bounds=len(run.exit_layers) * (len(metrics) + (latency is not None)))
    bounds = bounds_of(run, metrics, level=level)
    points = []
    for layer in run.exit_layers:
        found = {name: of.by_layer[layer] for name, of in bounds.items() if layer in of.by_layer}
        times = None if latency is None else _times(latency, layer, num_answer_tokens, error=level.error)
        points.append(
            Point(
                exit_layer=layer,
                metrics=found,
                times=times,
                flops_saved=None if savings is None else savings.saved(layer),
                flops_saved_share=None if savings is None else savings.saved_share(layer),
                bytes_saved=None if savings is None else savings.dropped_bytes[layer],
                is_pareto=not any(_beats(bounds, other, layer) for other in run.exit_layers if other < layer),
                misses=_misses(limits, bounds, layer, times),
            )
        )
    kept = [point.exit_layer for point in points if limits.given and not point.misses]
    return Recommendation(
        run=str(run.path),
        model=run.summary["model"],
        num_layers=run.summary["num_layers"],
        default_exit=run.summary["default_exit"],
        skip_global=bool(run.settings["skip_global"]),
        judge=str(judge_of(metrics[0], run.judges)),
        titles={metric.name: run.title(metric.name) for metric in metrics},
        cautions=run.cautions,
        confidence=level.confidence,
        num_bounds=level.num_bounds or 1,
        num_answer_tokens=num_answer_tokens,
        num_passes=0 if latency is None else len(latency.default),
        is_prompt_measured=None if savings is None else savings.is_measured,
        model_bytes=None if savings is None else savings.model_bytes,
        has_stopped="stopping" in run.summary,
        limits=limits,
        points=tuple(points),
        recommended=min(kept, default=None),
        nearest=_nearest(points) if limits.given and not kept else None,
        encoder_share=_encoder_share(latency, savings),
        most_saved=_most_saved(points[0]),
    )


BOUNDED = {"asr": "max_asr", "over_refusal": "max_over_refusal", "vqa_accuracy": "min_vqa"}
"""What is bounded, and the limit on it."""
_WAYS_OUT = {
    "over_refusal": "audit borderline samples with a judge of refusals",
    "vqa_accuracy": "audit vqa samples as well",
}


def bounded_metrics(run: AuditRun) -> list[Metric]:
    """Attack success, and over-refusal and VQA accuracy if the run has them.

    Raises:
        RunError: If it has no attack success.
    """
    there = {name for entry in run.summary["layers"] for name in entry["metrics"]}
    if "asr" not in there:
        raise RunError(
            f"{run.path} has no attack success, so no exit can be called safe: audit harmful samples with a judge of it"
        )
    return [BY_NAME[name] for name in BOUNDED if name in there]


def check_limits(run: AuditRun, limits: Limits, *, has_latency: bool) -> None:
    """Whether each limit can be judged, before anything is measured.

    Raises:
        RunError: If the run has no attack success.
        InputError: If a limit is on what the run has not measured.
    """
    if run.is_served:
        raise RunError(f"{run.path} is the run of a served model, which has only one exit: check it with exitsafe gate")
    there = {metric.name for metric in bounded_metrics(run)}
    for metric, limit in BOUNDED.items():
        if limit in limits.given and metric not in there:
            raise InputError(f"{limit}: {run.path} has no {metric}; {_WAYS_OUT[metric]}, or leave this limit out")
    if limits.max_ms is not None and not has_latency:
        raise InputError("max_ms: no times are measured; add --time to measure them, or leave this limit out")


def _times(latency: Latency, exit_layer: int, num_tokens: int, *, error: float) -> Times:
    passes = latency.exits[exit_layer]
    answers = [one.answer_ms(num_tokens) for one in passes]
    # the same request in the same round: whatever slows the machine for minutes slows both
    saved = [1 - mine / theirs.answer_ms(num_tokens) for mine, theirs in zip(answers, latency.default, strict=True)]
    return Times(
        encoder_ms=_time([one.encoder_ms for one in passes]),
        prefill_ms=_time([one.prefill_ms for one in passes]),
        decode_ms_per_token=_time([one.decode_ms_per_token for one in passes]),
        answer_ms=_time(answers),
        saved_share=_time(saved),
        bound=median_upper_bound(answers, error=error),
    )


def _time(values: Sequence[float]) -> Time:
    low, high = median_interval(values)
    return Time(median=float(np.median(values)), low=low, high=high)


def _misses(limits: Limits, bounds: dict[str, Bounds], exit_layer: int, times: Times | None) -> tuple[Miss, ...]:
    missed = []
    for metric, limit in BOUNDED.items():
        allowed = limits.given.get(limit)
        if allowed is None:
            continue
        found = bounds[metric].by_layer.get(exit_layer)
        if found is None or not bounds[metric].keeps(found.bound, allowed):
            missed.append(
                Miss(
                    limit=limit,
                    allowed=allowed,
                    bound=None if found is None else found.bound,
                    samples_needed=None if found is None else bounds[metric].samples_needed(exit_layer, allowed),
                )
            )
    if limits.max_ms is not None and times is not None and (times.bound is None or times.bound > limits.max_ms):
        missed.append(Miss(limit="max_ms", allowed=limits.max_ms, bound=times.bound, samples_needed=None))
    return tuple(missed)


def _excess(limit: str, bound: float | None, allowed: float) -> float:
    """How far a bound is beyond its limit: points of a rate, a share of a time; 1 for what is not known."""
    if bound is None:
        return 1.0
    if limit == "max_ms":
        return bound / allowed - 1
    return allowed - bound if limit == "min_vqa" else bound - allowed


def _nearest(points: Sequence[Point]) -> int:
    """The exit whose worst miss is the smallest; of equal ones the cheapest."""

    def worst(point: Point) -> float:
        return max(_excess(miss.limit, miss.bound, miss.allowed) for miss in point.misses)

    return min(points, key=lambda point: (worst(point), point.exit_layer)).exit_layer


def _beats(bounds: dict[str, Bounds], shallow: int, deep: int) -> bool:
    """Whether a shallower, so cheaper exit is as good as a deeper one in everything measured."""
    for of in bounds.values():
        if shallow not in of.by_layer or deep not in of.by_layer:
            return False
        if not of.keeps(of.by_layer[shallow].bound, of.by_layer[deep].bound):
            return False
    return True


def _encoder_share(latency: Latency | None, savings: Savings | None) -> dict[str, float]:
    found = {} if savings is None else {"counted": savings.encoder_share}
    if latency is None:
        return found

    def share(one: Pass) -> float:
        return one.encoder_ms / (one.encoder_ms + one.prefill_ms)

    return {"measured": float(np.median([share(one) for one in latency.default])), **found}


def _most_saved(shallowest: Point) -> dict[str, float]:
    found = {}
    if shallowest.times is not None:
        found["measured"] = shallowest.times.saved_share.median
    if shallowest.flops_saved_share is not None:
        found["counted"] = shallowest.flops_saved_share
    return found
