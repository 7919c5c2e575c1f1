"""The median of measured times, with bounds by order statistics, which assume nothing about the distribution.

Times of a fixed set of prompts, each measured equally often, are not a sample from one distribution; the number of them
below their common median then varies less than a binomial (Hoeffding 1956), so the bounds are conservative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from exitsafe.stats.intervals import CONFIDENCE


def median_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """The distribution-free interval for the median (Conover 1999); an end is None if the values are too few.

    >>> median_interval(range(1, 25))
    (7.0, 18.0)
    >>> median_interval([1, 2, 3])
    (None, None)
    """
    return _ends(values, "two-sided", confidence)


def median_upper_bound(values: Sequence[float], *, error: float) -> float | None:
    """The bound that the median exceeds with probability `error` at most; None if the values are too few.

    >>> median_upper_bound(range(1, 25), error=0.05)
    17.0
    """
    return _ends(values, "less", 1 - error)[1]


def _ends(
    values: Sequence[float], side: Literal["two-sided", "less"], confidence: float
) -> tuple[float | None, float | None]:
    from scipy.stats import quantile_test  # takes a second to import, and most commands do not need it

    if not len(values):
        return None, None
    found = quantile_test(list(values), p=0.5, alternative=side).confidence_interval(confidence)
    low, high = (float(end) if math.isfinite(end) else None for end in (found.low, found.high))
    return low, high
