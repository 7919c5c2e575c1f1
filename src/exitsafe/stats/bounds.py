"""Bounds for decisions, where the interval in a table is not reliable enough: numbers in, bounds out.

Far in the tail: for a choice among many exits each bound must hold with probability 0.999 or more, where Wilson's
normal approximation is wrong by factors. `upper_bound` and `lower_bound` hold for every n and every rate.

Rare events: the bootstrap only knows events that occurred. For one success in 73 samples its upper end is 4%, Wilson's
7%: a gate at 5% that relied on it would pass one in nine models whose rate is 5%. For means, bins and differences a
gate uses the wider of the bootstrap's end and `score_interval` or `change_margin` (see `exitsafe.gate.evidence`).
"""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri, rel_entr

from exitsafe.stats.bootstrap import Floats
from exitsafe.stats.intervals import CONFIDENCE

_HALVINGS = 60
_Z = float(ndtri((1 + CONFIDENCE) / 2))


def upper_bound(total: float, n: int, *, error: float, is_graded: bool = False) -> float:
    """The bound that the mean of scores between 0 and 1 exceeds with probability `error` at most; 1 without scores.

    Scores of 0 and 1: Clopper and Pearson 1934. Graded scores: Hoeffding 1963, theorem 1, which is wider.

    Args:
        total: Sum of the scores.
        n: Number of scores.
        error: Probability of being wrong.
        is_graded: Whether some scores lie strictly between 0 and 1.

    >>> round(upper_bound(0, 128, error=0.05), 4), round(upper_bound(2.5, 100, error=0.05, is_graded=True), 4)
    (0.0231, 0.0832)
    """
    assert 0 < error < 1, f"error={error} is not a probability"
    assert -1e-9 <= total <= n + 1e-9, f"{total} of {n}"
    if n == 0:
        return 1.0
    if is_graded:
        return _hoeffding(min(1.0, max(0.0, total / n)), n, error=error)
    successes = round(total)
    return 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - error))


def lower_bound(total: float, n: int, *, error: float, is_graded: bool = False) -> float:
    """The bound that the mean falls below with probability `error` at most; 0 without scores. Args as above."""
    return 1.0 - upper_bound(n - total, n, error=error, is_graded=is_graded)


def score_interval(values: Floats) -> tuple[float, float]:
    """Wilson's interval for the mean of independent numbers between 0 and 1.

    Zeros and ones with mean m have variance m (1 - m); numbers that vary less count as more samples in proportion (the
    effective sample size of survey statistics: Korn and Graubard 1998). For zeros and ones this is Wilson's interval.

    Args:
        values: (S,), not all equal.
    """
    mean, variance = float(values.mean()), float(values.var())
    assert variance > 0, "equal numbers have no variance"
    return _wilson(mean, len(values) * mean * (1 - mean) / variance)


def change_margin(gained: float, lost: float, num_samples: int) -> float:
    """The distance from gained - lost, two shares of the same pairs, to the upper bound of that difference.

    The squared distances to Wilson's limits of both add up, as in Newcombe 1998 and Zou and Donner 2008 (MOVER).

    Args:
        gained: The share of pairs that became worse, 0 to 1; for a bin, over its exits.
        lost: The share that became better.
        num_samples: Independent pairs.
    """
    _, most_gained = _wilson(gained, num_samples)
    least_lost, _ = _wilson(lost, num_samples)
    return math.hypot(most_gained - gained, lost - least_lost)


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


def _wilson(share: float, n: float) -> tuple[float, float]:
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + _Z**2 / n)), min(1.0, (centre + half) / (1 + _Z**2 / n))
