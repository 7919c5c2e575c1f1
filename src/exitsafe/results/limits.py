"""How sure a run is to keep a limit: the one bound, under the gate and `recommend` alike.

A bound is what a measure might be at worst, answers without a score counted against the model. `Level` says how sure
it is; docs/statistics.md#limits explains both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from exitsafe.results.metrics import Metric, judge_of
from exitsafe.results.run import AuditRun
from exitsafe.stats import Estimate, anytime_interval, wilson_interval
from exitsafe.stats.bounds import lower_bound, upper_bound
from exitsafe.stats.intervals import CONFIDENCE
from exitsafe.store.scores import ScoreTable

_MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True)
class Level:
    """How sure bounds are.

    Args:
        confidence: Of an interval, or of all bounds together.
        num_bounds: None: each bound by itself, an end of the interval that the tables print. A number: so many hold
            at once (Bonferroni), each of them exact, since it lies far in the tail.
    """

    confidence: float = CONFIDENCE
    num_bounds: int | None = None

    @property
    def error(self) -> float:
        """The probability, at most, that one bound does not hold."""
        return (1 - self.confidence) / (self.num_bounds or 2)

    def bound(
        self, total: float, n: int, *, is_upper: bool, is_graded: bool = False, stop_error: float | None = None
    ) -> float:
        """What the mean of scores between 0 and 1 might be at most, or at least.

        Args:
            total: Sum of the scores, missing ones counted as the worst.
            n: How many there are, missing ones included.
            is_upper: Which end.
            is_graded: Whether some scores lie between 0 and 1.
            stop_error: Of the sequential rule, where the answers decided how many were asked: only what holds at every
                look holds then.
        """
        if stop_error is not None:
            # a two-sided sequence at twice the error has this error on each side
            error = stop_error if self.num_bounds is None else 2 * self.error
            return anytime_interval(round(total), n, error=error)[is_upper]
        if self.num_bounds is None:
            assert not is_graded, "a mean of graded scores has the bootstrap's interval"
            return wilson_interval(round(total), n, confidence=self.confidence)[is_upper]
        bound = upper_bound if is_upper else lower_bound
        return bound(total, n, error=self.error, is_graded=is_graded)

    @lru_cache  # noqa: B019  # levels are few
    def fewest_samples(self, gap: float, stop_error: float | None = None) -> int:
        """The fewest samples, all of them good, that bound a share within this distance of the good end."""

        def is_enough(n: int) -> bool:
            return self.bound(0, n, is_upper=True, stop_error=stop_error) <= gap

        too_few, enough = 0, 1
        while not is_enough(enough):
            too_few, enough = enough, 2 * enough
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
        return enough


@dataclass(frozen=True, kw_only=True)
class Bounded(Estimate):
    """A metric at an exit as in the summary, and its bound: an upper one where high is bad, else a lower one."""

    bound: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """A metric's bounds at each exit of a run.

    Args:
        metric: What is bounded.
        level: How sure.
        is_graded: Whether some scores lie between 0 and 1.
        stop_error: That of the run's sequential rule, if the metric's answers were subject to it.
        by_layer: The exits with something to measure.
    """

    metric: Metric
    level: Level
    is_graded: bool
    stop_error: float | None
    by_layer: dict[int, Bounded]

    @property
    def sign(self) -> int:
        """1 where high is bad, else -1."""
        return 1 if self.metric.direction == "lower" else -1

    def keeps(self, bound: float, limit: float) -> bool:
        """Whether a bound is on the good side of a limit, or on it."""
        return self.sign * bound <= self.sign * limit

    def samples_needed(self, exit_layer: int, limit: float) -> int | None:
        """About how many answers at the rate seen, all scored, bring the bound within a limit; None if none do."""
        found = self.by_layer[exit_layer]
        if found.value is None or self.sign * found.value >= self.sign * limit:
            return None
        n = found.n + found.unscored
        while n < _MOST_SAMPLES:
            # a total of yes and no is whole: rounded to the worse side
            total = math.ceil(found.value * n - 1e-9) if self.sign > 0 else math.floor(found.value * n + 1e-9)
            if self.keeps(self._bound(total, n), limit):
                return n
            n += max(1, n // 20)
        return None

    def _bound(self, total: float, n: int) -> float:
        is_upper = self.sign > 0
        return self.level.bound(
            total, n, is_upper=is_upper, is_graded=self.is_graded, stop_error=self.stop_error if is_upper else None
        )


def bounds_of(run: AuditRun, metrics: Sequence[Metric], *, level: Level) -> dict[str, Bounds]:
    """Bound metrics on scales from 0 to 1, each by its judge, at every exit; by the metric's name.

    Args:
        run: A finished run that has the metrics.
        metrics: With a bad end each.
        level: How sure.
    """
    table = run.score_table()
    return {metric.name: _bounds(run, table, metric, level) for metric in metrics}


def _bounds(run: AuditRun, table: ScoreTable, metric: Metric, level: Level) -> Bounds:
    assert metric.bounds == (0.0, 1.0) and metric.direction is not None, f"{metric.name} has no rate to bound"
    scores = table.scores[str(judge_of(metric, run.judges)), metric.measure].of_samples(table.of_kinds(metric.kinds))
    stopping = run.summary.get("stopping")
    bounds = Bounds(
        metric=metric,
        level=level,
        is_graded=not bool(np.isin(scores.values[~np.isnan(scores.values)], (0.0, 1.0)).all()),
        stop_error=None if stopping is None or metric.kinds != ("harmful",) else float(stopping["error"]),
        by_layer={},
    )
    totals = np.nansum(scores.filled(float(bounds.sign > 0)).values, axis=0)
    for entry in run.summary["layers"]:
        estimate = entry["metrics"].get(metric.name)
        if estimate is not None:
            total = float(totals[table.exit_layers.index(entry["exit_layer"])])
            bound = bounds._bound(total, estimate["n"] + estimate["unscored"])
            bounds.by_layer[entry["exit_layer"]] = Bounded(**estimate, bound=bound)
    return bounds
