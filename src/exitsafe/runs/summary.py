"""A run's results: a table of scores in, the content of summary.json out. Reads and writes no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exitsafe.runs.metrics import METRICS, Metric, judge_of
from exitsafe.runs.scores import ScoreTable
from exitsafe.stats import BINS, Estimate, bin_estimates, layer_estimates

Summary = dict[str, Any]
"""The JSON object of summary.json: model, family, num_layers, default_exit, layers, bins, judges."""
_DIGITS = 12  # the last bits of a mean depend on how a machine sums


def summarise(table: ScoreTable, *, model: Mapping[str, Any], judges: Sequence[tuple[str, Sequence[str]]]) -> Summary:
    """Every metric per exit layer and per bin, by the first judge that has it, and again by each judge.

    Args:
        table: The run's scores.
        model: name, family, num_layers, default_exit.
        judges: Names and measures in the order of the command line.
    """
    num_layers = int(model["num_layers"])
    top = {metric: judge for metric in METRICS if (judge := judge_of(metric, judges)) is not None}
    by_judge = {
        name: {metric: name for metric in METRICS if not metric.is_own and metric.measure in measures}
        for name, measures in judges
    }
    return {
        "model": model["name"],
        "family": model["family"],
        "num_layers": num_layers,
        "default_exit": model["default_exit"],
        **_results(table, top, num_layers),
        "judges": {name: _results(table, chosen, num_layers) for name, chosen in by_judge.items()},
    }


def _results(table: ScoreTable, chosen: Mapping[Metric, str], num_layers: int) -> dict[str, Any]:
    """`layers` and `bins` of these metrics, each by its judge."""
    layers: dict[int, dict[str, Any]] = {layer: {} for layer in table.exit_layers}
    bins: dict[str, dict[str, Any]] = {}
    for metric, judge in chosen.items():
        scores = table.scores.get((judge, metric.measure))
        if scores is None:
            continue
        scores = scores.of_samples(table.of_kinds(metric.kinds))
        for layer, estimate in layer_estimates(
            scores.values, scores.unscored, exit_layers=table.exit_layers, bounds=metric.bounds
        ).items():
            layers[layer][metric.name] = _to_json(estimate)
        for name, estimate in bin_estimates(
            scores.values,
            scores.unscored,
            exit_layers=table.exit_layers,
            num_layers=num_layers,
            bounds=metric.bounds,
        ).items():
            bins.setdefault(name, {})[metric.name] = _to_json(estimate)
    return {
        "layers": [{"exit_layer": layer, "metrics": metrics} for layer, metrics in layers.items()],
        "bins": {name: {"metrics": bins[name]} for name in (*BINS, "average") if name in bins},
    }


def _to_json(estimate: Estimate) -> dict[str, Any]:
    rounded = {name: getattr(estimate, name) for name in ("value", "low", "high")}
    rounded = {name: None if number is None else round(number, _DIGITS) for name, number in rounded.items()}
    return {**rounded, "n": estimate.n, "unscored": estimate.unscored}
