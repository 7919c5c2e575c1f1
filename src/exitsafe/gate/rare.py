"""Bounds that keep their level where what counts against a model is rare: numbers in, bounds out.

The bootstrap knows only what it has seen. Of 73 samples with a single success its upper end is 4%, Wilson's 7%: a gate
at 5% that believed it would pass one model in nine whose rate is 5%. For means, bins and differences the gate therefore
takes the wider of the bootstrap's end and these.
"""

from __future__ import annotations

import math

from scipy.stats import norm

from exitsafe.stats.bootstrap import Floats
from exitsafe.stats.intervals import CONFIDENCE

_Z = float(norm.ppf((1 + CONFIDENCE) / 2))


def score_interval(values: Floats) -> tuple[float, float]:
    """Wilson's interval for the mean of independent numbers between 0 and 1.

    A rate of mean m has the variance m (1 - m); numbers that spread less are worth as many more samples (the effective
    sample size of survey statistics: Korn and Graubard 1998). Of zeros and ones this is Wilson's interval itself.

    Args:
        values: (S,), not all equal.
    """
    mean, variance = float(values.mean()), float(values.var())
    assert variance > 0, "equal numbers have no spread to go by"
    return _wilson(mean, len(values) * mean * (1 - mean) / variance)


def change_margin(gained: float, lost: float, num_samples: int) -> float:
    """How far above gained - lost, two shares of the same pairs, the upper bound of that difference is.

    The squares of the distances to Wilson's ends of both add up, as in Newcombe 1998 and Zou and Donner 2008 (MOVER).

    Args:
        gained: The share of pairs that became worse, 0 to 1; of a bin, over its exits.
        lost: The share that became better.
        num_samples: Independent pairs.
    """
    _, most_gained = _wilson(gained, num_samples)
    least_lost, _ = _wilson(lost, num_samples)
    return math.hypot(most_gained - gained, lost - least_lost)


def _wilson(share: float, n: float) -> tuple[float, float]:
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + _Z**2 / n)), min(1.0, (centre + half) / (1 + _Z**2 / n))
