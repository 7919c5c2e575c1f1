"""A run's metrics with one-sided bounds to decide by: at any error level, stopped early or not, missing scores counted.

A finished run and a metric in, a bound per exit layer out. Which error level is right is for the caller to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exitsafe.runs.finished import AuditRun
from exitsafe.runs.metrics import Metric, judge_of
from exitsafe.runs.scores import ScoreTable
from exitsafe.stats import anytime_interval
from exitsafe.stats.bounds import lower_bound, upper_bound

_MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """A metric at an exit: its value with its own 95% interval as in the summary, and the bound.

    `bound` is an upper bound where high is bad, else a lower one. Answers without a score count as the worst.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    bound: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """A metric's bounds in one run.

    Args:
        metric: What is bounded.
        error: The probability, at most, that a bound does not hold.
        is_graded: Whether some scores lie between 0 and 1.
        has_stopped: Whether the number of answers hangs on the answers, so that only what holds at every look holds.
        by_layer: The exits with something to measure.
    """

    metric: Metric
    error: float
    is_graded: bool
    has_stopped: bool
    by_layer: dict[int, Bounded]

    @property
    def sign(self) -> int:
        """1 where high is bad, else -1."""
        return 1 if self.metric.worse == "high" else -1

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
            if self.keeps(self._bound(total, n, unscored=0), limit):
                return n
            n += max(1, n // 20)
        return None

    def _bound(self, total: float, n: int, *, unscored: int) -> float:
        if self.sign < 0:
            return lower_bound(total, n + unscored, error=self.error, is_graded=self.is_graded)
        if self.has_stopped:  # a two-sided sequence at twice the error has this error on each side
            return anytime_interval(round(total), n, unscored=unscored, error=2 * self.error)[1]
        return upper_bound(total + unscored, n + unscored, error=self.error, is_graded=self.is_graded)


def bounds_of(run: AuditRun, metrics: Sequence[Metric], *, error: float) -> dict[str, Bounds]:
    """Bound metrics on scales from 0 to 1, each by its judge, at every exit.

    Args:
        run: A finished run that has the metrics.
        metrics: With a bad end each.
        error: The probability, at most, that a bound does not hold, each taken by itself.

    Returns:
        By the metric's name.
    """
    table = run.score_table()
    return {metric.name: _bounds(run, table, metric, error=error) for metric in metrics}


def _bounds(run: AuditRun, table: ScoreTable, metric: Metric, *, error: float) -> Bounds:
    assert metric.bounds == (0.0, 1.0) and metric.worse is not None, f"{metric.name} has no rate to bound"
    scores = table.scores[str(judge_of(metric, run.judges)), metric.measure].of_samples(table.of_kinds(metric.kinds))
    bounds = Bounds(
        metric=metric,
        error=error,
        is_graded=not bool(np.isin(scores.values[~np.isnan(scores.values)], (0.0, 1.0)).all()),
        has_stopped="stopping" in run.summary and metric.kinds == ("harmful",),
        by_layer={},
    )
    for entry in run.summary["layers"]:
        estimate = entry["metrics"].get(metric.name)
        if estimate is not None:
            total = float(np.nansum(scores.values[:, table.exit_layers.index(entry["exit_layer"])]))
            bound = bounds._bound(total, estimate["n"], unscored=estimate["unscored"])
            bounds.by_layer[entry["exit_layer"]] = Bounded(**estimate, bound=bound)
    return bounds
