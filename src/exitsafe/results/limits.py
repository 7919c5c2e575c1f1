"""Bounds on a run's metrics, which the gate and `recommend` check against limits.

A bound is the worst value that a metric may plausibly have, with unscored answers counted as failures. `Level` is its
confidence; docs/statistics.md#limits explains both kinds.
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
    """The confidence of bounds.

    Args:
        confidence: The confidence of an interval, or of all bounds together.
        num_bounds: None: each bound by itself is an end of the interval that the tables print. A number: that many
            bounds hold simultaneously (Bonferroni); they are exact, since they lie far in the tail.
    """

    confidence: float = CONFIDENCE
    num_bounds: int | None = None

    @property
    def error(self) -> float:
        """The highest probability that a bound does not hold."""
        return (1 - self.confidence) / (self.num_bounds or 2)

    def bound(
        self, total: float, n: int, *, is_upper: bool, is_graded: bool = False, stop_error: float | None = None
    ) -> float:
        """An upper or lower bound on the mean of scores between 0 and 1.

        Args:
            total: Sum of the scores, missing ones counted as the worst.
            n: Number of scores, missing ones included.
            is_upper: Whether to bound the mean from above.
            is_graded: Whether some scores lie strictly between 0 and 1.
            stop_error: The error of the sequential rule, if the answers decided how many were asked: then only an
                anytime-valid bound holds.
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
        """The fewest samples, all of them good, that bound a rate within this distance of the good end."""

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
    """A metric at an exit as in the summary, with its bound: an upper one where high is bad, else a lower one."""

    bound: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """A metric's bounds at each exit of a run.

    Args:
        metric: The bounded metric.
        level: The confidence.
        is_graded: Whether some scores lie strictly between 0 and 1.
        stop_error: The error of the run's sequential rule, if it applied to the metric's answers.
        by_layer: The bound at each exit that has answers for the metric.
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
        """Whether a bound is on the good side of a limit or equal to it."""
        return self.sign * bound <= self.sign * limit

    def samples_needed(self, exit_layer: int, limit: float) -> int | None:
        """About how many answers at the observed rate, all scored, bring the bound within a limit; None if none do."""
        found = self.by_layer[exit_layer]
        if found.value is None or self.sign * found.value >= self.sign * limit:
            return None
        n = found.n + found.unscored
        while n < _MOST_SAMPLES:
            # a total of 0/1 scores is an integer: round to the worse side
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
    """Bounds on metrics with a scale from 0 to 1 at every exit, by the metric's name.

    Args:
        run: A finished run that has the metrics.
        metrics: The metrics; each must have a direction.
        level: The confidence.
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
