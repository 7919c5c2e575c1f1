"""A run's results: a table of scores in, the content of summary.json out. Reads and writes no file.

docs/statistics.md explains every number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exitsafe.results.agreement import agreements_in
from exitsafe.results.metrics import METRICS, Metric, judge_of
from exitsafe.stats import (
    BINS,
    Estimate,
    PairedScores,
    anytime_interval,
    bin_estimates,
    choose_worst,
    first_half,
    holm,
    layer_estimates,
)
from exitsafe.store.scores import Scores, ScoreTable

Summary = dict[str, Any]
"""The JSON object of summary.json: model, family, num_layers, default_exit, layers, bins, against_default, worst,
stopping (of a run that stopped early), judges, agreement (of each two judges on what both measure)."""
Stopping = Mapping[str, Any]
"""max_asr, error, judge, and layers: for each layer that was allowed to stop its decision `below`, `above` or None."""
Estimates = dict[tuple[str, str], tuple[dict[int, Estimate], dict[str, Estimate]]]
"""By metric and judge, for each layer and bin: often a judge's own results are also the run's; computed only once."""
_DIGITS = 12  # the last bits of a mean depend on how a machine sums


def summarise(
    table: ScoreTable,
    *,
    model: Mapping[str, Any],
    judges: Sequence[tuple[str, Sequence[str]]],
    stopping: Stopping | None = None,
) -> Summary:
    """Every metric per exit layer and per bin, by the first judge that has it, and again by each judge.

    Args:
        table: The run's scores.
        model: name, family, num_layers, default_exit.
        judges: Names and measures in the order of the command line.
        stopping: What the sequential rule decided; None if every layer answered every sample.
    """
    num_layers = int(model["num_layers"])
    top = {metric: judge for metric in METRICS if (judge := judge_of(metric, judges)) is not None}
    estimates: Estimates = {}
    by_judge = {
        name: {metric: name for metric in METRICS if not metric.is_own and metric.measure in measures}
        for name, measures in judges
    }
    return {
        "model": model["name"],
        "family": model["family"],
        "num_layers": num_layers,
        "default_exit": model["default_exit"],
        **_results(table, top, num_layers, stopping, estimates),
        "against_default": against_default(table, top, default_exit=int(model["default_exit"])),
        "worst": _worst_layers(table, top, stopping),
        **({} if stopping is None else {"stopping": _decisions(table, stopping)}),
        "judges": {name: _results(table, chosen, num_layers, stopping, estimates) for name, chosen in by_judge.items()},
        "agreement": [
            {name: _rounded(value) for name, value in pair.to_dict().items()} for pair in agreements_in(table, judges)
        ],
    }


def against_default(table: ScoreTable, chosen: Mapping[Metric, str], *, default_exit: int) -> dict[str, Any]:
    """How each metric at each other layer differs from the default exit: `{"layers": [...]}` as in a summary.

    Paired by sample, Holm over the layers of a metric; no layers if the default exit was not audited.

    Args:
        table: The run's scores.
        chosen: Metrics and whose word they are.
        default_exit: The layer to compare with.
    """
    others = [layer for layer in table.exit_layers if layer != default_exit]
    if default_exit not in table.exit_layers or not others:
        return {"layers": []}
    found: dict[int, dict[str, Any]] = {layer: {} for layer in others}
    for metric, judge in chosen.items():
        scores = _scores_of(table, metric, judge)
        if scores is None or metric.name == "seconds":  # a batch holds several exits, its time is shared out
            continue
        pairs = _pairs_with(scores, table.exit_layers.index(default_exit), exit_layers=others, metric=metric)
        rows = pairs.layers()
        adjusted = holm([row.p_value for row in rows.values()])
        for (layer, row), p_adjusted in zip(rows.items(), adjusted, strict=True):
            content = vars(row) | {"p_adjusted": p_adjusted}
            found[layer][metric.name] = {
                {"before": "at_default", "after": "at_layer"}.get(name, name): _rounded(value)
                for name, value in content.items()
            }
    return {"layers": [{"exit_layer": layer, "metrics": metrics} for layer, metrics in found.items()]}


def _pairs_with(scores: Scores, column: int, *, exit_layers: Sequence[int], metric: Metric) -> PairedScores:
    """The default exit's scores before, every other layer's after; a pair is what both were asked."""
    was_asked = ~np.isnan(scores.values) | scores.unscored
    in_pair = was_asked & was_asked[:, [column]]
    unscored = (scores.unscored | scores.unscored[:, [column]]) & in_pair
    others = np.delete(np.arange(scores.values.shape[1]), column)
    return PairedScores(
        np.repeat(scores.values[:, [column]], len(others), axis=1),
        scores.values[:, others],
        unscored[:, others],
        exit_layers=exit_layers,
        bounds=metric.bounds,
    )


def _worst_layers(table: ScoreTable, chosen: Mapping[Metric, str], stopping: Stopping | None) -> dict[str, Any]:
    """The worst layer of each metric, chosen on one half of the samples and measured on the other.

    The first half chooses. `swapped` has the halves in each other's place: a second look at the same question, as
    valid by itself; the two share their data, so they are not pooled.
    """
    found = {}
    if len(table.exit_layers) > 1:
        for metric, judge in chosen.items():
            scores = _scores_of(table, metric, judge)
            if metric.direction is None or scores is None:
                continue
            ids = [table.samples[row].id for row in table.of_kinds(metric.kinds)]
            ways = [
                _worst_layer(scores, chooses, table.exit_layers, metric, stopping)
                for half in [first_half(ids)]
                for chooses in (half, ~half)
            ]
            if ways[0] is not None:
                found[metric.name] = {**ways[0], "swapped": ways[1]}
    return found


def _worst_layer(
    scores: Scores, chooses: Any, exit_layers: Sequence[int], metric: Metric, stopping: Stopping | None
) -> dict[str, Any] | None:
    choosing, measuring = (scores.of_samples(np.flatnonzero(half)) for half in (chooses, ~chooses))
    layer = choose_worst(choosing.values, exit_layers=exit_layers, is_high_worse=metric.direction == "lower")
    estimates = _layer_estimates(measuring, exit_layers, metric, stopping)
    if layer is None or layer not in estimates:
        return None
    chosen_on = int((~np.isnan(choosing.values[:, list(exit_layers).index(layer)])).sum())
    return {"exit_layer": layer, **_to_json(estimates[layer]), "chosen_on": chosen_on}


def _decisions(table: ScoreTable, stopping: Stopping) -> dict[str, Any]:
    """`stopping` with the answers that each decision rests on."""
    asr = next(metric for metric in METRICS if metric.name == "asr")
    scores = _scores_of(table, asr, stopping["judge"])
    layers = []
    for layer, decision in stopping["layers"].items():
        column = table.exit_layers.index(int(layer))
        n, unscored = (
            (0, 0)
            if scores is None
            else (int((~np.isnan(scores.values[:, column])).sum()), int(scores.unscored[:, column].sum()))
        )
        layers.append({"exit_layer": int(layer), "decision": decision, "n": n, "unscored": unscored})
    return {**{name: stopping[name] for name in ("max_asr", "error", "judge")}, "layers": layers}


def _results(
    table: ScoreTable,
    chosen: Mapping[Metric, str],
    num_layers: int,
    stopping: Stopping | None,
    known: Estimates,
) -> dict[str, Any]:
    """`layers` and `bins` of these metrics, each by its judge; what is known already is not computed again."""
    layers: dict[int, dict[str, Any]] = {layer: {} for layer in table.exit_layers}
    bins: dict[str, dict[str, Any]] = {}
    for metric, judge in chosen.items():
        scores = _scores_of(table, metric, judge)
        if scores is None:
            continue
        if (metric.name, judge) not in known:
            of_layers = _layer_estimates(scores, table.exit_layers, metric, stopping)
            of_bins = bin_estimates(
                scores.values,
                scores.unscored,
                exit_layers=table.exit_layers,
                num_layers=num_layers,
                bounds=metric.bounds,
            )
            known[metric.name, judge] = of_layers, of_bins
        of_layers, of_bins = known[metric.name, judge]
        for layer, estimate in of_layers.items():
            layers[layer][metric.name] = _to_json(estimate)
        for name, estimate in of_bins.items():
            bins.setdefault(name, {})[metric.name] = _to_json(estimate)
    return {
        "layers": [{"exit_layer": layer, "metrics": metrics} for layer, metrics in layers.items()],
        "bins": {name: {"metrics": bins[name]} for name in (*BINS, "average") if name in bins},
    }


def _layer_estimates(
    scores: Scores, exit_layers: Sequence[int], metric: Metric, stopping: Stopping | None
) -> dict[int, Estimate]:
    """As `layer_estimates`; where a layer stopped, a rate over harmful samples gets the interval that stays valid.

    A layer that stayed open has run to the end, as if there were no rule, and keeps its interval for fixed n.
    """
    found = layer_estimates(scores.values, scores.unscored, exit_layers=exit_layers, bounds=metric.bounds)
    is_rate = metric.bounds is not None and bool(np.isin(scores.values[~np.isnan(scores.values)], (0.0, 1.0)).all())
    if stopping is None or not is_rate or metric.kinds != ("harmful",):
        return found
    for layer in (int(layer) for layer, decision in stopping["layers"].items() if decision is not None):
        estimate = found.get(layer)
        if estimate is None or estimate.value is None:
            continue
        low, high = anytime_interval(
            round(estimate.value * estimate.n), estimate.n, unscored=estimate.unscored, error=stopping["error"]
        )
        found[layer] = replace(estimate, low=low, high=high)
    return found


def _scores_of(table: ScoreTable, metric: Metric, judge: str) -> Scores | None:
    """A metric's scores by a judge, of the samples that count."""
    scores = table.scores.get((judge, metric.measure))
    return None if scores is None else scores.of_samples(table.of_kinds(metric.kinds))


def _to_json(estimate: Estimate) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in vars(estimate).items()}


def _rounded(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float) else value
