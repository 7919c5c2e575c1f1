"""A measure per exit layer and per bin, with intervals: a (samples, layers) table in, estimates out.

A layer's rate gets Wilson's interval; a layer's mean, a bin and the average get a bootstrap interval clustered by
sample. Every estimate includes the number of scored and of unscored responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exitsafe.stats.bins import layers_by_bin
from exitsafe.stats.bootstrap import Floats, clustered_interval, mean_over, resampled_layer_means
from exitsafe.stats.intervals import wilson_interval

Bools = npt.NDArray[np.bool_]
Bounds = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A rate or mean with its 95% interval.

    `n` responses were scored and `unscored` could not be; value, low and high are None if `n` is 0.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int


def layer_estimates(
    scores: Floats, unscored: Bools, *, exit_layers: Sequence[int], bounds: Bounds
) -> dict[int, Estimate]:
    """One estimate per layer that has responses to measure.

    Args:
        scores: (S, L); NaN where there is no score.
        unscored: (S, L); True where a score should be but is missing.
        exit_layers: The L layers, in column order.
        bounds: Both ends of the scale; None for an open scale.
    """
    # one method for all layers of a measure, so that their intervals can be compared
    is_rate = bounds is not None and bool(np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all())
    replicates = None if is_rate else resampled_layer_means(_with_scores(scores))
    found = {}
    for column, layer in enumerate(exit_layers):
        values = scores[~np.isnan(scores[:, column]), column]
        n, missing = len(values), int(unscored[:, column].sum())
        if n + missing == 0:
            continue
        if n == 0:
            found[layer] = Estimate(value=None, low=None, high=None, n=0, unscored=missing)
            continue
        value = float(values.mean())
        if replicates is None:
            low, high = wilson_interval(int(values.sum()), n)
        else:
            low, high = clustered_interval(value, replicates[:, column], num_clusters=n, bounds=bounds)
        found[layer] = Estimate(value=value, low=low, high=high, n=n, unscored=missing)
    return found


def bin_estimates(
    scores: Floats, unscored: Bools, *, exit_layers: Sequence[int], num_layers: int, bounds: Bounds
) -> dict[str, Estimate]:
    """The aggregated measure of each bin and their `average` (AASR, ATS, ATR of arXiv 2411.04291).

    A bin's value is the mean of its layers' measures; `average` is the mean of the bins. Only audited layers count, a
    bin without audited layers is left out, and `average` is over the remaining bins: `n` and the audited layers say
    what is behind it.

    Args:
        scores, unscored, exit_layers, bounds: As for `layer_estimates`.
        num_layers: Blocks of the encoder, which the bins divide into three parts.
    """
    clusters = _with_scores(scores)
    replicates = resampled_layer_means(clusters)
    layer_means = mean_over(scores.T)  # (L,)
    columns = {
        name: [list(exit_layers).index(layer) for layer in layers]
        for name, layers in layers_by_bin(exit_layers, num_layers).items()
    }
    found: dict[str, Estimate] = {}
    bin_values, bin_replicates = [], []
    for name, chosen in columns.items():
        n, missing = int((~np.isnan(scores[:, chosen])).sum()), int(unscored[:, chosen].sum())
        if n + missing == 0:
            continue
        if n == 0:
            found[name] = Estimate(value=None, low=None, high=None, n=0, unscored=missing)
            continue
        value, resampled = float(np.nanmean(layer_means[chosen])), mean_over(replicates[:, chosen])
        num_clusters = int((~np.isnan(scores[:, chosen])).any(axis=1).sum())
        low, high = clustered_interval(value, resampled, num_clusters=num_clusters, bounds=bounds)
        found[name] = Estimate(value=value, low=low, high=high, n=n, unscored=missing)
        bin_values.append(value)
        bin_replicates.append(resampled)
    if found:
        found["average"] = _average(found, bin_values, bin_replicates, num_clusters=len(clusters), bounds=bounds)
    return found


def mean_estimate(scores: Floats, unscored: Bools, *, bounds: Bounds) -> Estimate:
    """The mean over layers of each layer's measure, with a bootstrap interval clustered by sample.

    Args:
        scores, unscored, bounds: As for `layer_estimates`, for the layers to average.
    """
    n, missing = int((~np.isnan(scores)).sum()), int(unscored.sum())
    if n == 0:
        return Estimate(value=None, low=None, high=None, n=0, unscored=missing)
    clusters = _with_scores(scores)
    value = float(np.nanmean(mean_over(scores.T)))
    resampled = mean_over(resampled_layer_means(clusters))
    low, high = clustered_interval(value, resampled, num_clusters=len(clusters), bounds=bounds)
    return Estimate(value=value, low=low, high=high, n=n, unscored=missing)


def _average(
    bins: Mapping[str, Estimate],
    values: list[float],
    replicates: list[Floats],
    *,
    num_clusters: int,
    bounds: Bounds,
) -> Estimate:
    n, unscored = sum(e.n for e in bins.values()), sum(e.unscored for e in bins.values())
    if not values:
        return Estimate(value=None, low=None, high=None, n=n, unscored=unscored)
    value = float(np.mean(values))
    resampled = mean_over(np.stack(replicates, axis=1))
    low, high = clustered_interval(value, resampled, num_clusters=num_clusters, bounds=bounds)
    return Estimate(value=value, low=low, high=high, n=n, unscored=unscored)


def _with_scores(scores: Floats) -> Floats:
    """The samples that have at least one score; only these are resampled."""
    return scores[~np.isnan(scores).all(axis=1)]
