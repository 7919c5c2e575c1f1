"""How far two raters agree beyond chance: paired labels in, Cohen's kappa with its interval out.

Rows of one sample (the same prompt at many exit layers) are not independent, so the bootstrap draws whole samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exitsafe.stats.bootstrap import Floats, percentile_interval, resampled_layer_means
from exitsafe.stats.intervals import constant_interval

_EPSILON = 1e-9  # differences below this are rounding error


@dataclass(frozen=True, kw_only=True)
class Kappa:
    """Cohen's kappa of two raters with its 95% interval.

    Args:
        value, low, high: 1 is full agreement, 0 is agreement by chance; None if kappa is undefined.
        undefined: Why kappa is undefined.
        observed: The (weighted) share of equal labels; None without pairs.
        n: Number of pairs.
        categories: The labels that occur, sorted.
        counts: Pairs by the first rater's label (rows) and the second's (columns), in that order; unweighted.
    """

    value: float | None
    low: float | None
    high: float | None
    undefined: str | None
    observed: float | None
    n: int
    categories: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]


def cohens_kappa(
    first: npt.ArrayLike, second: npt.ArrayLike, *, clusters: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Kappa:
    """Cohen's kappa (Cohen 1960) with a bootstrap interval clustered by sample.

    If a rater gave only one label, kappa is 0 or 0 / 0 whatever the other rater did, and meaningless: it is left
    undefined. If no resample differs from the value, e.g. in full agreement, the interval is that of
    `constant_interval` for the observed agreement, with the agreement by chance held fixed.

    Args:
        first, second: (N,) integer labels of the same rows.
        clusters: (N,) the sample of each row.
        weights: (N,) the number of rows that each row represents, if rows were drawn unequally; 1 each by default.

    >>> kappa = cohens_kappa([1, 1, 0, 0], [1, 0, 0, 0], clusters=["a", "b", "c", "d"])
    >>> kappa.value, kappa.observed, kappa.counts
    (0.5, 0.75, ((2, 0), (1, 1)))
    >>> cohens_kappa([1, 1], [1, 0], clusters=["a", "b"]).undefined
    'one rater gave the same label every time'
    """
    labels = np.array([first, second], dtype=np.int64)  # (2, N)
    num_pairs = labels.shape[1]
    weight = np.ones(num_pairs) if weights is None else np.asarray(weights, dtype=np.float64)
    categories, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(labels.shape)
    cells = _cells_by_cluster(codes, np.asarray(clusters), weight, k=len(categories))  # (C, k, k)
    table = cells.sum(axis=0)
    counts = np.zeros(table.shape, dtype=np.int64)
    np.add.at(counts, (codes[0], codes[1]), 1)
    found = Kappa(
        value=None,
        low=None,
        high=None,
        undefined=_why_undefined(codes),
        observed=float(np.trace(table) / table.sum()) if num_pairs else None,
        n=num_pairs,
        categories=tuple(categories.tolist()),
        counts=tuple(map(tuple, counts.tolist())),
    )
    if found.undefined is not None:
        return found
    low, high = _interval(cells)
    return replace(found, value=float(_kappas(table)), low=low, high=high)


def _why_undefined(codes: npt.NDArray[np.intp]) -> str | None:
    num_labels = [len(np.unique(side)) for side in codes]
    if min(num_labels) > 1:
        return None
    if max(num_labels) == 0:
        return "no row is labelled by both"
    return f"{'both raters' if max(num_labels) == 1 else 'one rater'} gave the same label every time"


def _cells_by_cluster(
    codes: npt.NDArray[np.intp], clusters: npt.NDArray[np.generic], weight: Floats, *, k: int
) -> Floats:
    """The weighted table of labels of each cluster, (C, k, k)."""
    names, places = np.unique(clusters, return_inverse=True)
    cells = np.zeros((len(names), k, k))
    np.add.at(cells, (places, codes[0], codes[1]), weight)
    return cells


def _kappas(tables: Floats) -> Floats:
    """Kappa of each table, (..., k, k) -> (...); NaN where the agreement by chance is 1."""
    observed = np.trace(tables, axis1=-2, axis2=-1) / tables.sum(axis=(-2, -1))
    room = 1 - _chance(tables)
    has_room = room > _EPSILON
    kappas: Floats = np.where(has_room, (observed - 1 + room) / np.where(has_room, room, 1.0), np.nan)
    return kappas


def _chance(tables: Floats) -> Floats:
    """The agreement expected of independent raters with these margins, (..., k, k) -> (...)."""
    margins = tables.sum(axis=-1) * tables.sum(axis=-2)
    chance: Floats = margins.sum(axis=-1) / tables.sum(axis=(-2, -1)) ** 2
    return chance


def _interval(cells: Floats) -> tuple[float, float]:
    num_clusters, k, _ = cells.shape
    table = cells.sum(axis=0)
    value = float(_kappas(table))
    # means of the cells are the resampled table up to a factor, on which kappa does not depend
    replicates = _kappas(resampled_layer_means(cells.reshape(num_clusters, k * k)).reshape(-1, k, k))
    if np.nanmax(replicates) - np.nanmin(replicates) > _EPSILON:
        low, high = percentile_interval(replicates, num_clusters=num_clusters)
        return min(low, value), max(high, value)
    observed, chance = float(np.trace(table) / table.sum()), float(_chance(table))
    sizes = cells.sum(axis=(1, 2))
    # unequal clusters are worth fewer clusters of equal size (Kish 1965)
    num_equal = int(sizes.sum() ** 2 / (sizes**2).sum() + _EPSILON)
    low, high = constant_interval(observed, num_equal, bounds=(0.0, 1.0))
    return max(-1.0, (low - chance) / (1 - chance)), min(1.0, (high - chance) / (1 - chance))
