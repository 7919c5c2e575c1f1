"""One-sided bounds that are sure at any error level: totals of scores in, the largest or smallest likely mean out.

For a choice among many exits each bound must hold with probability 0.999 and more, far out in the tail, where Wilson's
normal approximation is wrong by factors. These hold for every n and every rate.
"""

from __future__ import annotations

import math

from scipy.special import rel_entr
from scipy.stats import binomtest

_HALVINGS = 60


def upper_bound(total: float, n: int, *, error: float, is_graded: bool = False) -> float:
    """What the mean of scores between 0 and 1 exceeds with probability `error` at most; 1 where nothing was scored.

    Scores of 0 and 1: Clopper and Pearson 1934. Graded scores: Hoeffding 1963, theorem 1, which is wider.

    Args:
        total: Sum of the scores.
        n: How many there are.
        error: Probability of being wrong.
        is_graded: Whether some scores lie between 0 and 1.

    >>> round(upper_bound(0, 128, error=0.05), 4), round(upper_bound(2.5, 100, error=0.05, is_graded=True), 4)
    (0.0231, 0.0832)
    """
    assert 0 < error < 1, f"error={error} is no probability"
    assert -1e-9 <= total <= n + 1e-9, f"{total} of {n}"
    if n == 0:
        return 1.0
    if is_graded:
        return _hoeffding(min(1.0, max(0.0, total / n)), n, error=error)
    test = binomtest(round(total), n, alternative="less")
    return float(test.proportion_ci(confidence_level=1 - error, method="exact").high)


def lower_bound(total: float, n: int, *, error: float, is_graded: bool = False) -> float:
    """What the mean falls below with probability `error` at most; 0 where nothing was scored. Args as above."""
    return 1.0 - upper_bound(n - total, n, error=error, is_graded=is_graded)


def _hoeffding(mean: float, n: int, *, error: float) -> float:
    """The largest m with n KL(mean || m) <= log(1 / error): a mean this low has probability `error` under m."""
    allowed = math.log(1 / error) / n
    inside, outside = mean, 1.0
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        divergence = float(rel_entr(mean, middle) + rel_entr(1 - mean, 1 - middle))
        if divergence <= allowed:
            inside = middle
        else:
            outside = middle
    return outside
