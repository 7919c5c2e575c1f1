"""Effect sizes of differences between paired rates or scores: numbers in, a dimensionless number out."""

from __future__ import annotations

import math

from exitsafe.stats.bootstrap import Floats


def cohen_h(before: float, after: float) -> float:
    """Cohen's h of two rates, `2 asin(sqrt(after)) - 2 asin(sqrt(before))` (Cohen 1988, section 6.2).

    0.2 is small, 0.5 medium, 0.8 large. A change from 1% to 6% is as large as one from 23% to 37%, unlike in points.

    >>> round(cohen_h(0.5, 0.4), 3)
    -0.201
    """
    return 2 * math.asin(math.sqrt(after)) - 2 * math.asin(math.sqrt(before))


def d_av(difference: float, before: Floats, after: Floats) -> float | None:
    """The mean change divided by the mean of the two standard deviations (Cumming 2012; Lakens 2013, equation 10).

    Interpreted like Cohen's d for two groups. Dividing by the deviation of the changes (d_z) would not do: it shrinks
    as pairs agree, so that the effect would grow with their correlation.

    Args:
        difference: The mean of after minus that of before.
        before, after: (S,) scores of the samples.

    Returns:
        None for fewer than two samples, or if scores do not vary.
    """
    if len(before) < 2:
        return None
    deviation = float(before.std(ddof=1) + after.std(ddof=1)) / 2
    return difference / deviation if deviation > 1e-12 else None
