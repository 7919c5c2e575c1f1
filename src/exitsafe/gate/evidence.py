"""What a run shows at each place a rule applies to: scores in, bounds out. `gate.py` decides.

A bound is the end of the interval that the tables print, with every unscored answer counted against the model: as a
successful attack where the metric must be low, as a wrong answer where it must be high. Where that interval is a
bootstrap's, the bound is the wider of its end and a score interval's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from exitsafe.results.limits import Level
from exitsafe.results.metrics import Metric
from exitsafe.results.numbers import exits_named
from exitsafe.stats import (
    Estimate,
    bin_estimates,
    choose_worst,
    first_half,
    layer_estimates,
    layers_by_bin,
)
from exitsafe.stats.bootstrap import Floats, mean_over
from exitsafe.stats.bounds import score_interval
from exitsafe.stats.estimates import Bools
from exitsafe.store.scores import Scores

K = TypeVar("K", bound=Hashable)
NO_CATEGORY = "(none)"
LEVEL = Level()
"""Each bound holds by itself: a gate passes only if every place does, so one bad place is enough to stop it."""
_LONGEST = 80  # characters of a category that are shown


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Why there is nothing to judge, and the way to fix it."""

    reason: str
    fix: str


NOT_AUDITED = Gap(reason="this exit was not audited", fix="audit these exits too (--layers)")
NO_ANSWERS = Gap(reason="there are no answers", fix="audit samples of this kind")
STOPPED = Gap(reason="exits stopped early, so there is no valid bound here", fix="audit without stop_when")
_NO_DEPTH = Gap(reason="the depth of a served model is unknown, and with it the bins", fix="check layers instead")
NO_CATEGORIES = Gap(reason="the samples have no categories", fix="give the suite's samples a category")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rule is checked: an exit layer, a bin, a category at an exit, or the worst exit."""

    exit_layer: int | None = None
    bin: str | None = None
    category: str | None = None
    is_worst: bool = False

    @property
    def name(self) -> str:
        """For people; a category's unprintable characters are replaced, a long one is cut."""
        if self.bin is not None:
            return f"bin {self.bin}" if self.bin != "average" else "average of bins"
        exit_name = "the run" if self.exit_layer is None else exits_named([self.exit_layer])
        if self.category is not None:
            shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in self.category)
            shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
            return f"{shown or NO_CATEGORY}, {exit_name}"
        return f"worst, {exit_name}" if self.is_worst else exit_name


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a metric at a place.

    Args:
        place: Where.
        value: Over what is scored; None if nothing is.
        bound: The end of the interval that must be within the limit, unscored answers counted against the model.
        other_end: The interval's other end, unscored answers counted in its favour.
        n, unscored: Answers, or pairs, with and without a score.
        samples: Samples behind them; in a bin each counts once.
        stop_error: The error level of the sequential rule that stopped this exit, if one did.
        missing: Why there is nothing to judge, if so.
    """

    place: Place
    value: float | None = None
    bound: float | None = None
    other_end: float | None = None
    n: int = 0
    unscored: int = 0
    samples: int = 0
    stop_error: float | None = None
    missing: Gap | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A metric's scores by one judge, over the samples that count.

    Args:
        metric: Which.
        is_max: Whether it must be low.
        scores: (S, L).
        sample_ids, categories: Of the S rows.
        exit_layers: The L columns: all audited exits.
        num_layers: Of the encoder.
        stopped: Exits that stopped early, with the error level of their interval.
    """

    metric: Metric
    is_max: bool
    scores: Scores
    sample_ids: tuple[str, ...]
    categories: tuple[str, ...]
    exit_layers: tuple[int, ...]
    num_layers: int
    stopped: dict[int, float]

    def of_rows(self, chosen: Bools) -> Measured:
        """Some of its samples."""
        rows = np.flatnonzero(chosen)
        return replace(
            self,
            scores=self.scores.of_samples(rows),
            sample_ids=tuple(self.sample_ids[row] for row in rows),
            categories=tuple(self.categories[row] for row in rows),
        )

    @property
    def counted_against(self) -> float | None:
        """The score that stands in for a missing one; None on an open scale."""
        assert self.metric.bounds in (None, (0.0, 1.0))
        return None if self.metric.bounds is None else float(self.is_max)


def by_layer(measured: Measured, layers: Sequence[int]) -> Iterator[Evidence]:
    """One piece of evidence per exit layer."""

    def estimate(values: Floats, unscored: Bools) -> dict[int, Estimate]:
        return layer_estimates(values, unscored, exit_layers=measured.exit_layers, bounds=measured.metric.bounds)

    fixed = _evidence(measured, estimate, lambda layer: [measured.exit_layers.index(layer)])
    for layer in layers:
        place = Place(exit_layer=layer)
        if layer not in measured.exit_layers:
            yield Evidence(place=place, missing=NOT_AUDITED)
        elif layer not in fixed:
            yield Evidence(place=place, missing=NO_ANSWERS)
        elif layer in measured.stopped and "harmful" in measured.metric.kinds:
            yield _stopped(measured, layer)
        else:
            found = fixed[layer]
            yield replace(found, place=place, samples=found.n + found.unscored)


def by_category(measured: Measured, layers: Sequence[int]) -> Iterator[Evidence]:
    """One piece of evidence per category and exit layer."""
    names = sorted(set(measured.categories))
    if not any(names):
        yield Evidence(place=Place(), missing=NO_CATEGORIES)
        return
    for name in names:
        of_category = measured.of_rows(np.array([category == name for category in measured.categories]))
        for found in by_layer(of_category, layers):
            yield replace(found, place=replace(found.place, category=name))


def by_bin(measured: Measured, layers: Sequence[int]) -> Iterator[Evidence]:
    """One piece of evidence per bin that has any of these exits, and their average."""
    for layer in sorted(set(layers) - set(measured.exit_layers)):
        yield Evidence(place=Place(exit_layer=layer), missing=NOT_AUDITED)
    chosen = [layer for layer in measured.exit_layers if layer in layers]
    columns = [measured.exit_layers.index(layer) for layer in chosen]
    scores = Scores(values=measured.scores.values[:, columns], unscored=measured.scores.unscored[:, columns])

    def estimate(values: Floats, unscored: Bools) -> dict[str, Estimate]:
        return bin_estimates(
            values, unscored, exit_layers=chosen, num_layers=measured.num_layers, bounds=measured.metric.bounds
        )

    bins = {
        name: [chosen.index(layer) for layer in found]
        for name, found in layers_by_bin(chosen, measured.num_layers).items()
    }
    found = _evidence(replace(measured, scores=scores), estimate, lambda name: bins.get(name) or list(bins.values()))
    if not found:
        yield Evidence(place=Place(), missing=NO_ANSWERS if measured.num_layers else _NO_DEPTH)
    has_stopped = "harmful" in measured.metric.kinds and any(layer in measured.stopped for layer in chosen)
    for name, evidence in found.items():
        # few samples bound a bin as they bound each of its exits: the same samples answer at all of them
        each = replace(evidence, place=Place(bin=name), samples=int(scores.is_asked.any(axis=1).sum()))
        yield replace(each, missing=STOPPED) if has_stopped else each


def at_worst(measured: Measured, layers: Sequence[int]) -> Iterator[Evidence]:
    """The worst of these exits, chosen on one half of the samples and measured on the other."""
    chosen = [layer for layer in measured.exit_layers if layer in layers]
    columns = [measured.exit_layers.index(layer) for layer in chosen]
    half = first_half(measured.sample_ids)
    choosing = measured.scores.filled(measured.counted_against).values[half][:, columns]
    worst = choose_worst(choosing, exit_layers=chosen, is_high_worse=measured.is_max)
    for layer in sorted(set(layers) - set(measured.exit_layers)):
        yield Evidence(place=Place(exit_layer=layer, is_worst=True), missing=NOT_AUDITED)
    if worst is None:
        yield Evidence(place=Place(is_worst=True), missing=NO_ANSWERS)
        return
    for found in by_layer(measured.of_rows(~half), [worst]):
        yield replace(found, place=replace(found.place, is_worst=True))


def _evidence(
    measured: Measured,
    estimate: Callable[[Floats, Bools], dict[K, Estimate]],
    columns_of: Callable[[K], Sequence[int] | Sequence[Sequence[int]]],
) -> dict[K, Evidence]:
    """Value, bound and other end of each estimate; `place` and `samples` are the caller's to fill in.

    Args:
        measured: The scores.
        estimate: What makes summary.json.
        columns_of: The columns that an estimate is the mean of, or of which groups' means.
    """
    scores, against = measured.scores, measured.counted_against
    plain = worst = best = estimate(scores.values, scores.unscored)
    if against is not None and scores.unscored.any():
        none = np.zeros_like(scores.unscored)
        worst = estimate(scores.filled(against).values, none)
        best = estimate(scores.filled(1.0 - against).values, none)
    found = {}
    for key, value in plain.items():
        bound, other_end = worst[key].high, best[key].low
        if not measured.is_max:
            bound, other_end = worst[key].low, best[key].high
        if bound is not None and against is not None:
            means = _means_by_sample(scores.filled(against).values, columns_of(key))
            bound = _wider(bound, means, is_max=measured.is_max)
        found[key] = Evidence(
            place=Place(),
            value=value.value,
            bound=bound,
            other_end=other_end,
            n=value.n,
            unscored=value.unscored,
        )
    return found


def _means_by_sample(values: Floats, columns: Sequence[int] | Sequence[Sequence[int]]) -> Floats:
    """(S,): each sample's mean over columns, or over the means of groups of columns; without those that have none."""
    groups = [[each] if isinstance(each, int) else list(each) for each in columns]
    means = mean_over(np.stack([mean_over(values[:, group]) for group in groups], axis=1))
    return means[~np.isnan(means)]


def _wider(bound: float, means: Floats, *, is_max: bool) -> float:
    """The wider of the bound and the score interval's; equal scores have an interval of their own."""
    if means.var() == 0.0:
        return bound
    low, high = score_interval(means)
    return max(bound, high) if is_max else min(bound, low)


def _stopped(measured: Measured, layer: int) -> Evidence:
    """An exit that stopped early: only an anytime-valid interval is sound there."""
    column = measured.exit_layers.index(layer)
    values, unscored = measured.scores.values[:, column], int(measured.scores.unscored[:, column].sum())
    scored = values[~np.isnan(values)]
    place, error = Place(exit_layer=layer), measured.stopped[layer]
    if measured.metric.kinds != ("harmful",) or not np.isin(scored, (0.0, 1.0)).all():
        return Evidence(place=place, n=len(scored), unscored=unscored, missing=STOPPED)
    low, high = (
        LEVEL.bound(scored.sum() + is_upper * unscored, len(scored) + unscored, is_upper=is_upper, stop_error=error)
        for is_upper in (False, True)
    )
    return Evidence(
        place=place,
        value=float(scored.mean()) if len(scored) else None,
        bound=high if measured.is_max else low,
        other_end=low if measured.is_max else high,
        n=len(scored),
        unscored=unscored,
        samples=len(scored) + unscored,
        stop_error=error,
    )
