"""The bootstrap clustered by sample: a (samples, layers) table of scores in, resampled layer means out.

All layers answer the same prompts, so a sample is drawn with all its layers: means of layers, bins and
before/after differences then share their noise, as in the experiment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from exitsafe.stats.intervals import CONFIDENCE, constant_interval

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000
_CELLS_AT_ONCE = 4_000_000
_CELLS_TO_KEEP = 1_000_000


def resampled_layer_means(scores: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Each layer's mean in each resample of the samples (Efron 1979; Field and Welsh 2007 for clusters).

    Args:
        scores: (S, L); NaN where a sample has no score at a layer.
        resamples: R, the number of times that S samples are drawn with replacement.
        seed: The same seed and S draw the same samples, whatever the scores.

    Returns:
        (R, L); NaN where a resample has no score for that layer.
    """
    num_samples, num_layers = scores.shape
    if num_samples == 0:
        return np.full((resamples, num_layers), np.nan)
    is_scored = ~np.isnan(scores)
    filled = np.where(is_scored, scores, 0.0)
    means = []
    is_small = resamples * num_samples <= _CELLS_TO_KEEP
    for weights in (_kept_weights if is_small else _draw_weights)(seed, resamples, num_samples):  # (r, S)
        totals, counts = weights @ filled, weights @ is_scored.astype(np.float64)  # (r, L)
        means.append(np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0))
    return np.concatenate(means)


def percentile_interval(
    replicates: Floats, *, num_clusters: int | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile interval of resampled values (R,), expanded for few samples; NaN values are ignored.

    Plain percentiles are those of a normal distribution with too small a deviation: with 10 samples they cover the
    truth in 92% of cases instead of 95%. Moving them outwards by Student's t and n - 1 corrects this (Hesterberg 2015).

    Args:
        replicates: (R,).
        num_clusters: The number of samples that were resampled, 2 or more; None for plain percentiles.
        confidence: Nominal coverage.
    """
    tail = (1 - confidence) / 2
    if num_clusters is not None:
        tail = ndtr(stdtrit(num_clusters - 1, tail) * math.sqrt(num_clusters / (num_clusters - 1)))
    low, high = np.nanquantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def clustered_interval(
    value: float, replicates: Floats, *, num_clusters: int, bounds: tuple[float, float] | None
) -> tuple[float, float]:
    """The interval for a mean: percentiles of its resampled values, or `constant_interval` if they are all equal.

    Args:
        value: The mean itself, which the interval always contains.
        replicates: (R,) resampled values.
        num_clusters: The number of samples that were resampled.
        bounds: Both ends of the scale; None for an open scale.
    """
    if np.nanmax(replicates) - np.nanmin(replicates) < 1e-12:
        return constant_interval(value, num_clusters, bounds=bounds)
    low, high = percentile_interval(replicates, num_clusters=num_clusters)
    # with a handful of samples, the value itself can be just outside its percentiles
    return min(low, value), max(high, value)


def mean_over(columns: Floats) -> Floats:
    """The mean of each row's values that are not NaN: (R, L) -> (R,); NaN if there are none."""
    has_value = ~np.isnan(columns)
    counts = has_value.sum(axis=1)
    totals = np.where(has_value, columns, 0.0).sum(axis=1)
    means: Floats = np.divide(totals, counts, out=np.full(len(columns), np.nan), where=counts > 0)
    return means


def _draw_weights(seed: int, resamples: int, num_samples: int) -> Iterator[Floats]:
    """How often each sample is drawn, (r, S) at a time: integers, so that sums of 0/1 scores stay exact."""
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, _CELLS_AT_ONCE // num_samples)
    for start in range(0, resamples, rows_at_once):
        num_rows = min(rows_at_once, resamples - start)
        drawn = rng.integers(num_samples, size=(num_rows, num_samples))
        drawn += np.arange(num_rows)[:, None] * num_samples
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_samples)
        yield counts.reshape(num_rows, num_samples).astype(np.float64)


@lru_cache(maxsize=8)
def _kept_weights(seed: int, resamples: int, num_samples: int) -> tuple[Floats, ...]:
    """Kept, since a summary resamples the same few numbers of samples dozens of times."""
    return tuple(_draw_weights(seed, resamples, num_samples))
