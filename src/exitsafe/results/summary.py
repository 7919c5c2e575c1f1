"""A run's results: a table of scores in, the content of summary.json out.

docs/statistics.md explains every number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exitsafe.results.agreement import agreements_in
from exitsafe.results.metrics import METRICS, Metric, judge_of
from exitsafe.results.stopping import Stopping
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
from exitsafe.store.fingerprint import Settings
from exitsafe.store.scores import Scores, ScoreTable
from exitsafe.untrusted import JsonObject

Summary = JsonObject
"""The content of summary.json: model, family, num_layers, default_exit, layers, bins, against_default, worst,
stopping (if the run stopped early), judges, agreement (of each pair of judges on what both measure)."""
Estimates = dict[tuple[str, str], tuple[dict[int, Estimate], dict[str, Estimate]]]
"""By metric and judge, for each layer and bin: the results of the run are also those of a judge; computed once."""
_DIGITS = 12  # the last bits of a mean depend on the machine's order of summation


def summarise(
    table: ScoreTable,
    *,
    model: Settings,
    judges: Sequence[tuple[str, Sequence[str]]],
    stopping: Stopping | None = None,
) -> Summary:
    """Every metric per exit layer and per bin, from the judge that reports it and again from each judge.

    Args:
        table: The run's scores.
        model: name, family, num_layers, default_exit.
        judges: Names and measures in the order of the command line.
        stopping: The decisions of the sequential rule; None if every layer answered every sample.
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


def against_default(table: ScoreTable, chosen: Mapping[Metric, str], *, default_exit: int) -> JsonObject:
    """The difference of each metric at each other layer from the default exit: `{"layers": [...]}` as in a summary.

    Paired by sample, Holm over the layers of a metric; no layers if the default exit was not audited.

    Args:
        table: The run's scores.
        chosen: Metrics and the judges that report them.
        default_exit: The layer to compare with.
    """
    others = [layer for layer in table.exit_layers if layer != default_exit]
    if default_exit not in table.exit_layers or not others:
        return {"layers": []}
    found: dict[int, JsonObject] = {layer: {} for layer in others}
    for metric, judge in chosen.items():
        scores = _scores_of(table, metric, judge)
        if scores is None or metric.name == "seconds":  # several exits share a batch and its time
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
    """Pairs of the default exit (before) and every other layer (after); a pair is a sample that both answered."""
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


def _worst_layers(table: ScoreTable, chosen: Mapping[Metric, str], stopping: Stopping | None) -> JsonObject:
    """The worst layer of each metric, chosen on one half of the samples and measured on the other.

    The first half chooses. `swapped` exchanges the halves: a second, equally valid estimate; the two share their data,
    so they are not pooled.
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
    scores: Scores,
    chooses: npt.NDArray[np.bool_],
    exit_layers: Sequence[int],
    metric: Metric,
    stopping: Stopping | None,
) -> JsonObject | None:
    choosing, measuring = (scores.of_samples(np.flatnonzero(half)) for half in (chooses, ~chooses))
    layer = choose_worst(choosing.values, exit_layers=exit_layers, is_high_worse=metric.direction == "lower")
    estimates = _layer_estimates(measuring, exit_layers, metric, stopping)
    if layer is None or layer not in estimates:
        return None
    chosen_on = int((~np.isnan(choosing.values[:, list(exit_layers).index(layer)])).sum())
    return {"exit_layer": layer, **_to_json(estimates[layer]), "chosen_on": chosen_on}


def _decisions(table: ScoreTable, stopping: Stopping) -> JsonObject:
    """`stopping` with the number of answers behind each decision."""
    asr = next(metric for metric in METRICS if metric.name == "asr")
    scores = _scores_of(table, asr, stopping["judge"])
    layers = []
    for layer, decision in stopping["layers"].items():
        column = table.exit_layers.index(layer)
        n, unscored = (
            (0, 0)
            if scores is None
            else (int((~np.isnan(scores.values[:, column])).sum()), int(scores.unscored[:, column].sum()))
        )
        layers.append({"exit_layer": layer, "decision": decision, "n": n, "unscored": unscored})
    return {**stopping, "layers": layers}


def _results(
    table: ScoreTable,
    chosen: Mapping[Metric, str],
    num_layers: int,
    stopping: Stopping | None,
    known: Estimates,
) -> JsonObject:
    """`layers` and `bins` of these metrics, each by its judge; estimates in `known` are not computed again."""
    layers: dict[int, JsonObject] = {layer: {} for layer in table.exit_layers}
    bins: dict[str, JsonObject] = {}
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
    """As `layer_estimates`, but where a layer stopped, a rate over harmful samples gets an anytime-valid interval.

    A layer that ran to the end, as it would without a rule, keeps its interval for fixed n.
    """
    found = layer_estimates(scores.values, scores.unscored, exit_layers=exit_layers, bounds=metric.bounds)
    is_rate = metric.bounds is not None and bool(np.isin(scores.values[~np.isnan(scores.values)], (0.0, 1.0)).all())
    if stopping is None or not is_rate or metric.kinds != ("harmful",):
        return found
    for layer in (layer for layer, decision in stopping["layers"].items() if decision is not None):
        estimate = found.get(layer)
        if estimate is None or estimate.value is None:
            continue
        low, high = anytime_interval(
            round(estimate.value * estimate.n), estimate.n, unscored=estimate.unscored, error=stopping["error"]
        )
        found[layer] = replace(estimate, low=low, high=high)
    return found


def _scores_of(table: ScoreTable, metric: Metric, judge: str) -> Scores | None:
    """A metric's scores by a judge, for the samples that count."""
    scores = table.scores.get((judge, metric.measure))
    return None if scores is None else scores.of_samples(table.of_kinds(metric.kinds))


def _to_json(estimate: Estimate) -> JsonObject:
    return {name: _rounded(value) for name, value in vars(estimate).items()}


def _rounded(value: object) -> object:
    return round(value, _DIGITS) if isinstance(value, float) else value
