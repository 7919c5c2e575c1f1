"""Tests on pairs: the same samples before and after. Counts or resampled differences in, p-values out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtr  # scipy.stats takes a second to import

from exitsafe.stats.bootstrap import Floats


def mcnemar_exact(gained: int, lost: int) -> float:
    """The two-sided exact McNemar test: a binomial test on the pairs that changed.

    Args:
        gained: Pairs that went from 0 to 1.
        lost: Pairs that went from 1 to 0.

    >>> mcnemar_exact(0, 5)  # 2 / 2 ** 5
    0.0625
    """
    num_changed, ways, below = gained + lost, 1, 0
    for count in range(min(gained, lost) + 1):
        below += ways
        ways = ways * (num_changed - count) // (count + 1)
    return min(1.0, 2 * below / (1 << num_changed))  # exact integers until here


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979), in the order given; not in scipy.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    num_tests = len(p_values)
    adjusted = [0.0] * num_tests
    largest = 0.0
    for rank, index in enumerate(sorted(range(num_tests), key=lambda i: p_values[i])):
        # a later test is never more significant than an earlier one
        largest = max(largest, min(1.0, (num_tests - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_p_value(replicates: Floats, *, num_clusters: int) -> float:
    """The two-sided p-value from the share of resampled differences on the far side of 0; never exactly 0.

    One is added to counts and total (Davison and Hinkley 1997, section 4.2): R resamples cannot show less than
    about 2 / R. The share is converted to Student's t as in `percentile_interval`, so that p is below 0.05 when 0 is
    outside the 95% interval.

    Args:
        replicates: (R,) differences; NaN where a resample has none.
        num_clusters: The number of samples that were resampled; a single one cannot be tested.
    """
    drawn = replicates[~np.isnan(replicates)]
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    share = (1 + min(below, above)) / (1 + len(drawn))
    if num_clusters < 2 or share >= 0.5:
        return 1.0
    return float(2 * stdtr(num_clusters - 1, ndtri(share) * math.sqrt((num_clusters - 1) / num_clusters)))
