"""Paired differences, before and after or between layers: two (samples, layers) tables in, differences out.

Each difference has an interval, a test and an effect size. Intervals are bootstrapped with samples as clusters. At a
layer, scores that are all 0 or 1 are tested by McNemar's test; everything else by the bootstrap, since in a bin the
same sample counts at several layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exitsafe.stats.bins import layers_by_bin
from exitsafe.stats.bootstrap import Floats, clustered_interval, mean_over, resampled_layer_means
from exitsafe.stats.effects import cohen_h, d_av
from exitsafe.stats.estimates import Bools, Bounds
from exitsafe.stats.paired import bootstrap_p_value, mcnemar_exact


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """after - before over pairs that are scored on both sides.

    Args:
        before, after: Means over the pairs; for a bin, the mean of its layers' means.
        difference, low, high: after - before with its 95% interval.
        n, unscored: Pairs that count, and pairs left out because a score is missing.
        gained, lost: Pairs that went from 0 to 1 and from 1 to 0; None unless all scores are 0 or 1.
        test, p_value: The two-sided test used, and its result.
        effect_size, effect_measure: The effect size and its kind: Cohen's h for rates, `d_av` for other scores (see
            `exitsafe.stats.effects`); None if it is undefined.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    unscored: int
    gained: int | None
    lost: int | None
    test: Literal["mcnemar", "bootstrap"]
    p_value: float
    effect_size: float | None
    effect_measure: Literal["cohen_h", "d_av"]


class PairedScores:
    """Two tables of scores of the same samples at the same layers.

    Args:
        before, after: (S, L); NaN where there is no score.
        unscored: (S, L); True where either side should have a score but has none.
        exit_layers: The L layers, in column order.
        bounds: Both ends of the scale; None for an open scale.
    """

    def __init__(
        self, before: Floats, after: Floats, unscored: Bools, *, exit_layers: Sequence[int], bounds: Bounds
    ) -> None:
        is_scored = ~np.isnan(before) & ~np.isnan(after)
        self.before = np.where(is_scored, before, np.nan)
        self.after = np.where(is_scored, after, np.nan)
        self.changes = self.after - self.before
        self.unscored = unscored
        self.exit_layers = list(exit_layers)
        # the bounds of a difference
        self.bounds = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
        scores = np.concatenate([before[is_scored], after[is_scored]])
        self.is_binary = bounds is not None and bool(np.isin(scores, (0.0, 1.0)).all())
        self.has_pairs = [bool(column.any()) for column in is_scored.T]
        self.replicates = resampled_layer_means(self.changes[is_scored.any(axis=1)])  # (R, L)

    def layers(self) -> dict[int, PairedDifference]:
        """One difference per layer that has pairs."""
        return {
            layer: self._difference([[column]], self.replicates[:, column], is_layer=True)
            for column, layer in enumerate(self.exit_layers)
            if self.has_pairs[column]
        }

    def bins(self, num_layers: int) -> dict[str, PairedDifference]:
        """The mean over each bin's layers, and `average`, the mean of the bins; only layers with pairs count."""
        columns = {
            name: [column for column in map(self.exit_layers.index, layers) if self.has_pairs[column]]
            for name, layers in layers_by_bin(self.exit_layers, num_layers).items()
        }
        columns = {name: chosen for name, chosen in columns.items() if chosen}
        if not columns:
            return {}
        means = {name: mean_over(self.replicates[:, chosen]) for name, chosen in columns.items()}
        found = {name: self._difference([chosen], means[name]) for name, chosen in columns.items()}
        average = mean_over(np.stack(list(means.values()), axis=1))
        return found | {"average": self._difference(list(columns.values()), average)}

    def unscored_layers(self) -> dict[int, int]:
        """Layers at which none of the pairs is scored, with the number of pairs."""
        counts = self.unscored.sum(axis=0)
        return {
            layer: int(counts[column])
            for column, layer in enumerate(self.exit_layers)
            if counts[column] and not self.has_pairs[column]
        }

    def _difference(
        self, groups: Sequence[Sequence[int]], replicates: Floats, *, is_layer: bool = False
    ) -> PairedDifference:
        """The difference of the mean over groups of columns; a group counts with the mean of its columns' means."""
        before, after = (
            float(np.mean([np.mean([np.nanmean(side[:, column]) for column in group]) for group in groups]))
            for side in (self.before, self.after)
        )
        effect = cohen_h(before, after) if self.is_binary else self._d_av(groups, after - before)
        columns = [column for group in groups for column in group]
        changes = self.changes[:, columns]
        has_pair = ~np.isnan(changes)
        num_clusters = int(has_pair.any(axis=1).sum())
        low, high = clustered_interval(after - before, replicates, num_clusters=num_clusters, bounds=self.bounds)
        gained, lost = int((changes == 1).sum()), int((changes == -1).sum())
        uses_mcnemar = is_layer and self.is_binary
        return PairedDifference(
            before=before,
            after=after,
            difference=after - before,
            low=low,
            high=high,
            n=int(has_pair.sum()),
            unscored=int(self.unscored[:, columns].sum()),
            gained=gained if self.is_binary else None,
            lost=lost if self.is_binary else None,
            test="mcnemar" if uses_mcnemar else "bootstrap",
            p_value=mcnemar_exact(gained, lost)
            if uses_mcnemar
            else bootstrap_p_value(replicates, num_clusters=num_clusters),
            effect_size=effect,
            effect_measure="cohen_h" if self.is_binary else "d_av",
        )

    def _d_av(self, groups: Sequence[Sequence[int]], difference: float) -> float | None:
        """`d_av` over samples; in a bin, a sample's score is the mean over its layers."""
        sides = []
        for side in (self.before, self.after):
            of_groups = np.stack([mean_over(side[:, list(group)]) for group in groups], axis=1)
            scores = mean_over(of_groups)
            sides.append(scores[~np.isnan(scores)])
        return d_av(difference, *sides)
