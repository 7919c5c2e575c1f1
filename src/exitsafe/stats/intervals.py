"""Confidence intervals without resampling: counts in, (low, high) out."""

from __future__ import annotations

import math

from scipy.special import ndtri

CONFIDENCE = 0.95


def wilson_interval(successes: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a rate (Wilson 1927); (0, 1) for 0 trials.

    >>> low, high = wilson_interval(62, 200)
    >>> round(low, 3), round(high, 3)
    (0.25, 0.377)
    """
    if n == 0:
        return 0.0, 1.0
    rate, z = successes / n, float(ndtri(0.5 + 0.5 * confidence))
    scale = 2 * (n + z**2)
    centre = (2 * n * rate + z**2) / scale
    half = z / scale * math.sqrt(4 * n * rate * (1 - rate) + z**2)
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def constant_interval(
    value: float, n: int, *, bounds: tuple[float, float] | None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval for a mean of `n` equal values, where resampling would claim certainty.

    None of `n` samples differed; Wilson's upper limit for 0 of `n` bounds the share of samples that could differ.
    That share moves the mean by at most itself, within `bounds`. For 0 of `n` and `n` of `n` this is Wilson's
    interval itself. Without bounds, nothing can be said beyond the value.

    >>> constant_interval(0.0, 10, bounds=(0, 1)) == wilson_interval(0, 10)
    True
    """
    if bounds is None:
        return value, value
    _, share = wilson_interval(0, n, confidence=confidence)
    return max(bounds[0], value - share), min(bounds[1], value + share)
