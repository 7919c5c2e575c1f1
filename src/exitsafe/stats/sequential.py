"""Sequential tests of rates: counts in, an anytime-valid interval and a decision out.

Checking Wilson's interval repeatedly and stopping at will is wrong more often than 5%. The interval here is valid at
all checks together. For a candidate rate m, the e-value is the likelihood ratio of "the rate is smaller than m" to "it
is m", averaged over the smaller rates by Jeffreys' prior Beta(1/2, 1/2) truncated at m (Robbins 1970). If the true rate
is m or more, it is a nonnegative supermartingale that starts at 1, so by Ville's inequality (1939) it ever reaches
2 / error with probability at most error / 2. `high` is the end of the rates above the observed one whose e-value stays
below that; `low` is the mirror image. Such an interval contains the true rate at *all* checks together with probability
1 - error (a confidence sequence: Howard, Ramdas, McAuliffe and Sekhon 2021; by betting on bounded outcomes:
Waudby-Smith and Ramdas 2024). A decision is made when that interval is on one side of `max_rate`, so it is wrong with
probability at most error / 2. If there is none before the suite ends, the 95% interval for fixed n is used as in any
audit: its 2.5% per side comes on top, so at the default error of 5% the audit as a whole does not exceed 5%.

This requires samples in random order, and a number of checks that depends on nothing but the past. As with Wilson's
interval, it is about the rate for the kind of requests of which the suite is a sample. If samples are drawn without
replacement from a finite suite, a decision is also right about the suite's own rate with probability 1 - error:
docs/statistics.md has the proof.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaln, xlog1py, xlogy

Decision = Literal["below", "above"]
ERROR = 0.05
_PRIOR = 0.5  # Jeffreys' prior, which of all Beta(a, a) has the smallest worst-case regret
_HALVINGS = 60


def decide(successes: int, n: int, *, max_rate: float, unscored: int = 0, error: float = ERROR) -> Decision | None:
    """Whether the rate is at most `max_rate` (`below`) or more (`above`); None while that is undecided.

    May be called after any number of samples, as often as one likes; stopping at the first decision is right with
    probability at least 1 - error / 2.

    Args:
        successes: Scored samples that count towards the rate.
        n: Scored samples.
        max_rate: The highest allowed rate, 0 to 1.
        unscored: Samples without a score. They count as successes for `below` and as failures for `above`: a missing
            score can never cause a decision.
        error: The interval's error level.

    >>> decide(0, 90, max_rate=0.05), decide(0, 90, max_rate=0.05, unscored=1), decide(4, 8, max_rate=0.05)
    ('below', None, 'above')
    """
    _check(successes, n, unscored=unscored, error=error)
    assert 0 <= max_rate <= 1, f"max_rate={max_rate} is not a rate"
    threshold = np.log(2 / error)
    num_seen = n + unscored
    if log_e_value(successes + unscored, num_seen, max_rate) >= threshold:
        return "below"
    if log_e_value(num_seen - successes, num_seen, 1 - max_rate) >= threshold:
        return "above"
    return None


def anytime_interval(successes: int, n: int, *, unscored: int = 0, error: float = ERROR) -> tuple[float, float]:
    """The interval that contains the rate at all checks together with probability 1 - error.

    Args:
        successes, n, unscored, error: As for `decide`; the interval holds whatever the unscored answers were.

    >>> low, high = anytime_interval(4, 200)
    >>> round(low, 3), round(high, 3)
    (0.002, 0.067)
    """
    _check(successes, n, unscored=unscored, error=error)
    num_seen = n + unscored
    low = 1 - _upper_bound(num_seen - successes, num_seen, error=error)
    return low, _upper_bound(successes + unscored, num_seen, error=error)


def decision_bounds(
    num_samples: int, *, max_rate: float, error: float = ERROR
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`decide` as a table, for many runs at once.

    Returns:
        (N + 1,) each, by the number of samples seen: the largest number of successes that decides `below` (-1 if none
        does) and the smallest that decides `above` (N + 1 if none does).
    """
    below, above = np.full(num_samples + 1, -1), np.full(num_samples + 1, num_samples + 1)
    threshold = np.log(2 / error)
    for seen in range(1, num_samples + 1):
        counts = np.arange(seen + 1)
        # e-values are monotone in the successes: count instead of searching
        below[seen] = int((log_e_value(counts, seen, max_rate) >= threshold).sum()) - 1
        above[seen] = seen + 1 - int((log_e_value(seen - counts, seen, 1 - max_rate) >= threshold).sum())
        if above[seen] > seen:
            above[seen] = num_samples + 1
    return below, above


def log_e_value(successes: npt.ArrayLike, n: int, rate: float) -> npt.NDArray[np.float64]:
    """The logarithm of the evidence against "the rate is `rate` or more", elementwise over `successes`.

    The log of the mean of (q^S (1-q)^F) / (m^S (1-m)^F) over q < m under Beta(1/2, 1/2), in closed form by the
    incomplete beta function.
    """
    hits = np.asarray(successes, dtype=np.float64)
    misses = n - hits
    if rate <= 0:  # nothing is smaller
        return np.full(hits.shape, -np.inf)
    with np.errstate(divide="ignore"):
        smaller = np.log(betainc(hits + _PRIOR, misses + _PRIOR, rate)) - np.log(betainc(_PRIOR, _PRIOR, rate))
    mixture = betaln(hits + _PRIOR, misses + _PRIOR) - betaln(_PRIOR, _PRIOR) + smaller
    found: npt.NDArray[np.float64] = mixture - xlogy(hits, rate) - xlog1py(misses, -rate)
    return found


def _upper_bound(successes: int, n: int, *, error: float) -> float:
    """The smallest rate above the observed one that the e-value rejects; 1 if none."""
    if successes == n:
        return 1.0
    threshold = np.log(2 / error)
    # above the threshold the e-value grows with the rate, so bisection works
    inside, outside = successes / n, 1.0
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if log_e_value(successes, n, middle) >= threshold:
            outside = middle
        else:
            inside = middle
    return outside


def _check(successes: int, n: int, *, unscored: int, error: float) -> None:
    assert 0 <= successes <= n and unscored >= 0, f"{successes} of {n}, {unscored} unscored"
    assert 0 < error < 1, f"error={error} is not a probability"
