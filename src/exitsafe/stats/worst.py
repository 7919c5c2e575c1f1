"""The worst layer without selection bias: chosen on one half of the samples, to be measured on the other.

The highest of 24 noisy rates is biased upwards, since noise is part of the reason for choosing it. On samples that
played no part in the choice, the chosen layer's rate is unbiased and its interval is valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from exitsafe.stats.bootstrap import Floats, mean_over
from exitsafe.stats.estimates import Bools


def choose_worst(scores: Floats, *, exit_layers: Sequence[int], is_high_worse: bool) -> int | None:
    """The layer with the highest (or lowest) mean, the shallowest of equal ones; None if nothing is scored.

    Args:
        scores: (S, L) for the samples to choose by; NaN where there is no score.
        exit_layers: The L layers, in column order.
        is_high_worse: Whether high scores are bad.
    """
    means = mean_over(scores.T)  # (L,)
    scored = [(mean if is_high_worse else -mean, -layer) for mean, layer in zip(means, exit_layers, strict=True)]
    best = max((pair for pair in scored if not np.isnan(pair[0])), default=None)
    return None if best is None else -best[1]


def first_half(sample_ids: Sequence[str]) -> Bools:
    """(S,) True for about half of the samples, by a hash of the id: the same in every run, whatever its samples."""
    return np.array([hashlib.sha256(i.encode()).digest()[0] % 2 == 0 for i in sample_ids], dtype=np.bool_)
