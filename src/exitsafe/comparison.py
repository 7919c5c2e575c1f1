"""Before against after, paired: two finished runs in, differences with intervals and tests out.

Only what both runs asked is compared: samples with the same id and the same content, at the same exit
layers, by the same judge. Everything else is counted and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exitsafe.errors import RunError
from exitsafe.runs import AuditRun, load_run
from exitsafe.runs.files import write_whole
from exitsafe.runs.metrics import METRICS, Metric, judge_of
from exitsafe.runs.scores import Scores, ScoreTable
from exitsafe.stats import (
    bootstrap_p_value,
    constant_interval,
    holm,
    layers_by_bin,
    mcnemar_exact,
    percentile_interval,
    resampled_layer_means,
)
from exitsafe.stats.bootstrap import Floats, mean_over


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric at one exit layer or in one bin, before against after.

    Args:
        metric: As in summary.json.
        judge: Whose verdicts; "" for what the audit counts itself.
        place: The exit layer, or the bin's name (`early`, `middle`, `late`, `average`).
        before, after: The metric over the pairs, on both sides scored.
        difference, low, high: after - before with its 95% interval, bootstrap clustered by sample.
        n: Pairs (responses that both runs scored).
        unscored: Pairs left out because a judge could not score one of the two.
        gained, lost: Pairs that went from 0 to 1 and from 1 to 0; None where scores are not all 0 or 1.
        test: `mcnemar` (exact) at a layer if scores are all 0 or 1, else `bootstrap`: in a bin the same
        sample
            counts at several layers, which McNemar's test does not allow.
        p_value: Two-sided.
        p_adjusted: Holm over the layers of this metric; None for bins.
    """

    metric: str
    judge: str
    place: int | str
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
    p_adjusted: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All differences between two runs, and what could not be compared.

    Args:
        before, after: The run directories.
        num_layers, default_exit: Of the encoder before.
        exit_layers: Layers audited in both.
        num_samples: Samples in both.
        only_before, only_after: Samples left out because the other run lacks them.
        changed: Samples left out because the same id asks something else in the other run.
        metrics_left_out: Metrics that no judge measured in both runs.
        layers: Differences per metric and exit layer.
        bins: Differences per metric and bin; none if the two encoders differ in depth.
    """

    before: str
    after: str
    num_layers: int
    default_exit: int
    exit_layers: tuple[int, ...]
    num_samples: int
    only_before: int
    only_after: int
    changed: int
    metrics_left_out: tuple[str, ...]
    layers: tuple[Difference, ...]
    bins: tuple[Difference, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics compared, in the order of summary.json."""
        return tuple(dict.fromkeys(row.metric for row in self.layers))

    def rows(self, metric: str) -> tuple[Difference, ...]:
        """A metric's table: its layers in order, then its bins."""
        return tuple(row for row in (*self.layers, *self.bins) if row.metric == metric)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, `layers` and `bins` shaped as in summary.json."""
        content = asdict(self)
        layers: dict[int | str, dict[str, Any]] = {layer: {} for layer in self.exit_layers}
        bins: dict[int | str, dict[str, Any]] = {row.place: {} for row in self.bins}
        for found, rows in ((layers, content["layers"]), (bins, content["bins"])):
            for row in rows:
                found[row.pop("place")][row.pop("metric")] = row
        content["layers"] = [{"exit_layer": layer, "metrics": rows} for layer, rows in layers.items()]
        content["bins"] = {name: {"metrics": rows} for name, rows in bins.items()}
        return content

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def compare(before: AuditRun | str | Path, after: AuditRun | str | Path) -> Comparison:
    """Compare two audits, paired by sample and exit layer.

    Args:
        before, after: Finished runs or their directories. Models may differ; samples and layers should not.

    Raises:
        RunError: If a directory holds no finished run, or the runs share no sample or no exit layer.
    """
    before = before if isinstance(before, AuditRun) else load_run(before)
    after = after if isinstance(after, AuditRun) else load_run(after)
    pairing = _pair(before, after)
    rows = [(metric, judge, _paired_scores(pairing, metric, judge)) for metric, judge in _shared_metrics(before, after)]
    num_layers = int(before.summary["num_layers"])
    bins = layers_by_bin(pairing.exit_layers, num_layers) if num_layers == after.summary["num_layers"] else {}
    compared = {metric.name for metric, _, _ in rows}
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        num_layers=num_layers,
        default_exit=int(before.summary["default_exit"]),
        exit_layers=pairing.exit_layers,
        num_samples=pairing.num_samples,
        only_before=pairing.only_before,
        only_after=pairing.only_after,
        changed=pairing.changed,
        metrics_left_out=tuple(name for name in _metrics_in(before, after) if name not in compared),
        layers=tuple(row for metric, judge, pairs in rows for row in _layer_rows(metric, judge, pairs, pairing)),
        bins=tuple(row for metric, judge, pairs in rows for row in _bin_rows(metric, judge, pairs, pairing, bins)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairing:
    """Two score tables cut to the samples and layers that both have, in the order of before."""

    before: ScoreTable
    after: ScoreTable
    before_rows: npt.NDArray[np.intp]
    after_rows: npt.NDArray[np.intp]
    exit_layers: tuple[int, ...]
    num_samples: int
    only_before: int
    only_after: int
    changed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairs:
    """One metric's scores before and after, (S, L) each, NaN unless both are scored; pairs not scored, (L,)."""

    before: Floats
    after: Floats
    num_unscored: npt.NDArray[np.intp]
    is_binary: bool


def _pair(before: AuditRun, after: AuditRun) -> _Pairing:
    tables = before.score_table(), after.score_table()
    rows_before, rows_after = ({s.id: row for row, s in enumerate(table.samples)} for table in tables)
    shared = [sample_id for sample_id in rows_before if sample_id in rows_after]
    paired = [i for i in shared if tables[0].samples[rows_before[i]].digest == tables[1].samples[rows_after[i]].digest]
    layers = tuple(layer for layer in tables[0].exit_layers if layer in tables[1].exit_layers)
    if not paired:
        raise RunError(
            f"{before.path} and {after.path} share no sample ({len(shared)} ids are the same but ask something else); "
            "audit both with the same suites, split and seed"
        )
    if not layers:
        raise RunError(f"{before.path} and {after.path} share no exit layer; audit both at the same layers")
    return _Pairing(
        before=tables[0],
        after=tables[1],
        before_rows=np.array([rows_before[i] for i in paired], dtype=np.intp),
        after_rows=np.array([rows_after[i] for i in paired], dtype=np.intp),
        exit_layers=layers,
        num_samples=len(paired),
        only_before=len(rows_before) - len(shared),
        only_after=len(rows_after) - len(shared),
        changed=len(shared) - len(paired),
    )


def _shared_metrics(before: AuditRun, after: AuditRun) -> Iterator[tuple[Metric, str]]:
    """Metrics with the first judge of before that after has too: judges are never mixed."""
    in_both = [(name, measures) for name, measures in before.judges if (name, measures) in after.judges]
    for metric in METRICS:
        judge = judge_of(metric, in_both)
        if judge is not None and metric.name != "seconds":  # times of two runs are not paired by anything
            yield metric, judge


def _metrics_in(*runs: AuditRun) -> list[str]:
    """Metrics that either run has results of, times aside."""
    found = {name for run in runs for layer in run.summary["layers"] for name in layer["metrics"]}
    return [metric.name for metric in METRICS if metric.name in found - {"seconds"}]


def _paired_scores(pairing: _Pairing, metric: Metric, judge: str) -> _Pairs:
    chosen = np.array([s.kind in metric.kinds for s in pairing.before.samples])[pairing.before_rows]
    sides = [
        _cut(table, rows[chosen], pairing.exit_layers, judge, metric.measure)
        for table, rows in ((pairing.before, pairing.before_rows), (pairing.after, pairing.after_rows))
    ]
    is_scored = ~np.isnan(sides[0].values) & ~np.isnan(sides[1].values)
    is_unscored = sides[0].unscored | sides[1].unscored
    scores = np.concatenate([side.values[is_scored] for side in sides])
    return _Pairs(
        before=np.where(is_scored, sides[0].values, np.nan),
        after=np.where(is_scored, sides[1].values, np.nan),
        num_unscored=is_unscored.sum(axis=0),
        is_binary=metric.bounds is not None and bool(np.isin(scores, (0.0, 1.0)).all()),
    )


def _cut(table: ScoreTable, rows: npt.NDArray[np.intp], layers: Sequence[int], judge: str, measure: str) -> Scores:
    columns = [table.exit_layers.index(layer) for layer in layers]
    cells = np.ix_(rows, np.array(columns, dtype=np.intp))
    found = table.scores.get((judge, measure))
    if found is None:  # the judge had nothing to judge, e.g. no picture questions
        shape = len(rows), len(columns)
        return Scores(values=np.full(shape, np.nan), unscored=np.zeros(shape, dtype=np.bool_))
    return Scores(values=found.values[cells], unscored=found.unscored[cells])


def _layer_rows(metric: Metric, judge: str, pairs: _Pairs, pairing: _Pairing) -> list[Difference]:
    replicates = _replicates(pairs)
    rows = [
        _difference(metric, judge, layer, pairs, [[column]], replicates[:, column], is_layer=True)
        for column, layer in enumerate(pairing.exit_layers)
        if not np.isnan(pairs.before[:, column]).all()
    ]
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_adjusted=p) for row, p in zip(rows, adjusted, strict=True)]


def _bin_rows(
    metric: Metric, judge: str, pairs: _Pairs, pairing: _Pairing, bins: Mapping[str, Sequence[int]]
) -> list[Difference]:
    """Each bin as the mean of its layers, and their average as the mean of the bins."""
    replicates = _replicates(pairs)
    measured = [not np.isnan(column).all() for column in pairs.before.T]
    columns = {
        name: [c for c in map(pairing.exit_layers.index, layers) if measured[c]] for name, layers in bins.items()
    }
    columns = {name: chosen for name, chosen in columns.items() if chosen}
    if not columns:
        return []
    means = {name: mean_over(replicates[:, chosen]) for name, chosen in columns.items()}
    rows = [
        _difference(metric, judge, name, pairs, [chosen], means[name], is_layer=False)
        for name, chosen in columns.items()
    ]
    average = mean_over(np.stack(list(means.values()), axis=1))
    return [
        *rows,
        _difference(metric, judge, "average", pairs, list(columns.values()), average, is_layer=False),
    ]


def _replicates(pairs: _Pairs) -> Floats:
    """Resampled differences per layer, (R, L)."""
    differences = pairs.after - pairs.before
    return resampled_layer_means(differences[~np.isnan(differences).all(axis=1)])


def _difference(
    metric: Metric,
    judge: str,
    place: int | str,
    pairs: _Pairs,
    groups: Sequence[Sequence[int]],
    replicates: Floats,
    *,
    is_layer: bool,
) -> Difference:
    """One row; its value is the mean over groups of the mean over a group's columns of the columns' means."""
    columns = [column for group in groups for column in group]
    before, after = (
        float(np.mean([np.mean([np.nanmean(side[:, c]) for c in group]) for group in groups]))
        for side in (pairs.before, pairs.after)
    )
    changes = (pairs.after - pairs.before)[:, columns]
    has_pair = ~np.isnan(changes)
    low, high = _interval(after - before, replicates, int(has_pair.any(axis=1).sum()), metric)
    gained = int((changes == 1).sum()) if pairs.is_binary else None
    lost = int((changes == -1).sum()) if pairs.is_binary else None
    uses_mcnemar = is_layer and gained is not None and lost is not None
    return Difference(
        metric=metric.name,
        judge=judge,
        place=place,
        before=before,
        after=after,
        difference=after - before,
        low=low,
        high=high,
        n=int(has_pair.sum()),
        unscored=int(pairs.num_unscored[columns].sum()),
        gained=gained,
        lost=lost,
        test="mcnemar" if uses_mcnemar else "bootstrap",
        p_value=mcnemar_exact(gained or 0, lost or 0) if uses_mcnemar else bootstrap_p_value(replicates),
        p_adjusted=None,
    )


def _interval(difference: float, replicates: Floats, num_clusters: int, metric: Metric) -> tuple[float, float]:
    if np.nanmax(replicates) - np.nanmin(replicates) < 1e-12:
        width = None if metric.bounds is None else metric.bounds[1] - metric.bounds[0]
        bounds = None if width is None else (-width, width)
        return constant_interval(difference, num_clusters, bounds=bounds)
    low, high = percentile_interval(replicates)
    return min(low, difference), max(high, difference)
