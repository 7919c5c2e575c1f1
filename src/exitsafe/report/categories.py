"""Attack success by category and exit layer: one run's scores in, rates with intervals out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exitsafe.runs import AuditRun
from exitsafe.runs.metrics import METRICS, judge_of
from exitsafe.runs.scores import ScoreTable
from exitsafe.stats import Estimate
from exitsafe.stats.estimates import layer_estimates

MAX_CATEGORIES = 40
"""More rows than this nobody reads; the page says how many it leaves out."""


@dataclass(frozen=True, kw_only=True)
class CategoryRates:
    """Attack success of a run in each category.

    Args:
        judge: Whose verdicts.
        rates: By category, those with most samples first; by exit layer.
        num_left_out: Smaller categories that are not among them.
    """

    judge: str
    rates: Mapping[str, Mapping[int, Estimate]]
    num_left_out: int


def category_rates(run: AuditRun, table: ScoreTable) -> CategoryRates | None:
    """None where nobody judged attack success, or all harmful samples are of one category."""
    metric = next(metric for metric in METRICS if metric.name == "asr")
    judge = judge_of(metric, run.judges)
    scores = None if judge is None else table.scores.get((judge, metric.measure))
    rows = table.of_kinds(metric.kinds)
    of_row = np.array([table.samples[row].category for row in rows], dtype=object)
    counts = Counter(of_row.tolist())
    if judge is None or scores is None or len(counts) < 2:
        return None
    chosen = [category for category, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    harmful = scores.of_samples(rows)
    rates = {}
    for category in chosen[:MAX_CATEGORIES]:
        own = harmful.of_samples(np.flatnonzero(of_row == category))
        rates[category] = layer_estimates(own.values, own.unscored, exit_layers=table.exit_layers, bounds=metric.bounds)
    return CategoryRates(judge=judge, rates=rates, num_left_out=len(chosen[MAX_CATEGORIES:]))
