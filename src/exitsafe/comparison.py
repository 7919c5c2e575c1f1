"""Before against after, paired: two finished runs in, differences with intervals and tests out.

Only what both runs asked is compared: samples with the same id and the same content, at the same exit
layers, by the same judge. Everything else is counted and left out. Models whose exits do not mean the same thing are
refused; a changed model is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exitsafe.errors import InputError, RunError
from exitsafe.runs import AuditRun, load_run
from exitsafe.runs.files import write_whole
from exitsafe.runs.fingerprint import differences
from exitsafe.runs.finished import label_runs
from exitsafe.runs.metrics import METRICS, Metric, judge_of
from exitsafe.runs.scores import Scores, ScoreTable
from exitsafe.stats import PairedDifference, PairedScores, holm

_MUST_AGREE = {"family": "families", "num_layers": "encoder depths", "default_exit": "default exits"}
_MODEL = {
    "checkpoint": "base checkpoint",
    "name": "model name",
    "dtype": "dtype",
    "quantization": "quantization",
    "skip_global": "skip_global",
}
"""What stays the same unless somebody changed the model, the weights first."""
_REPAIR = {"adapter": "adapter", "translators": "translators"}
_SAID_ELSEWHERE = (
    *(f"{prefix}{name}{end}" for name in (*_MODEL, *_REPAIR) for prefix in ("", "model.") for end in (" ", ".")),
    "model.family ", "model.num_layers ", "model.default_exit ",
    "data.", "trained_on", "exit_layers ", "judges ",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference(PairedDifference):
    """One metric at one exit layer or in one bin, before against after.

    Args:
        metric: As in summary.json.
        judge: Whose verdicts; "" for what the audit counts itself.
        place: The exit layer, or the bin's name (`early`, `middle`, `late`, `average`).
        p_adjusted: p_value by Holm over the layers of this metric; None for bins.
    """

    metric: str
    judge: str
    place: int | str
    p_adjusted: float | None


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """A metric that could not be compared at a layer, since no pair has two scores."""

    metric: str
    judge: str
    exit_layer: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All differences between two runs, and what could not be compared.

    Args:
        before, after: The run directories.
        num_layers, default_exit: Of both encoders.
        models_changed: How the base models differ (weights, name, precision), one line each. The runs are compared all
            the same, but part of a change may come from that.
        repairs_changed: How the adapters and translators differ, which is what a comparison is usually about.
        cautions: What to know before reading the numbers of either run, e.g. samples that were trained on.
        titles: The title of each compared metric, which depends on its judge.
        exit_layers: Layers audited in both.
        num_samples: Samples in both.
        only_before, only_after: Samples left out because the other run lacks them.
        changed: Samples left out because the same id asks something else in the other run.
        settings_changed: Which settings differ between the two audits, one line each: decoding, versions, what a judge
            rests on. The runs are compared all the same; the reader decides whether that is fair.
        metrics_left_out: Metrics that no judge measured in both runs.
        unscored: Metrics and layers left out because no pair could be scored.
        layers: Differences per metric and exit layer.
        bins: Differences per metric and bin.
    """

    before: str
    after: str
    num_layers: int
    default_exit: int
    models_changed: tuple[str, ...]
    repairs_changed: tuple[str, ...]
    cautions: tuple[str, ...]
    titles: Mapping[str, str]
    exit_layers: tuple[int, ...]
    num_samples: int
    only_before: int
    only_after: int
    changed: int
    settings_changed: tuple[str, ...]
    metrics_left_out: tuple[str, ...]
    unscored: tuple[Unscored, ...]
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
        before, after: Finished runs or their directories. Weights may differ; samples and layers should not.

    Raises:
        InputError: If the models' exits do not mean the same thing: another family, depth or default exit.
        RunError: If a directory holds no finished run, or the runs share no sample or no exit layer.
    """
    before = before if isinstance(before, AuditRun) else load_run(before)
    after = after if isinstance(after, AuditRun) else load_run(after)
    check_comparable([before, after])
    pairing = _pair(before, after)
    pairs = [
        (metric, judge, _paired_scores(pairing, metric, judge)) for metric, judge in _shared_metrics(before, after)
    ]
    num_layers = int(before.summary["num_layers"])
    measured = {metric.name for metric, _, _ in pairs}
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        num_layers=num_layers,
        default_exit=int(before.summary["default_exit"]),
        models_changed=tuple(_changes(before, after, _MODEL)),
        repairs_changed=tuple(_changes(before, after, _REPAIR)),
        cautions=tuple(_cautions(before, after)),
        titles={metric.name: before.title(metric.name, judge) for metric, judge, _ in pairs},
        exit_layers=pairing.exit_layers,
        num_samples=pairing.num_samples,
        only_before=pairing.only_before,
        only_after=pairing.only_after,
        changed=pairing.changed,
        settings_changed=_settings_changed(before, after),
        metrics_left_out=tuple(name for name in _metrics_in(before, after) if name not in measured),
        unscored=tuple(
            Unscored(metric=metric.name, judge=judge, exit_layer=layer, pairs=count)
            for metric, judge, scores in pairs
            for layer, count in scores.unscored_layers().items()
        ),
        layers=tuple(row for metric, judge, scores in pairs for row in _layer_rows(metric, judge, scores)),
        bins=tuple(
            Difference(metric=metric.name, judge=judge, place=name, p_adjusted=None, **vars(found))
            for metric, judge, scores in pairs
            for name, found in scores.bins(num_layers).items()
        ),
    )


def check_comparable(runs: Sequence[AuditRun]) -> None:
    """Check that an exit layer means the same thing in all runs.

    Raises:
        InputError: If they are of different families, encoder depths or default exits.
    """
    for name, what in _MUST_AGREE.items():
        found = sorted({str(run.summary.get(name)) for run in runs})
        if len(found) > 1:
            raise InputError(
                f"these runs have the {what} {' and '.join(found)}: their exits are not comparable; "
                "give runs of one model, or report each separately"
            )


def _changes(before: AuditRun, after: AuditRun, names: Mapping[str, str]) -> Iterator[str]:
    """Differences between two models, one line each, e.g. `adapter: none before, 9f86d081884c after`."""
    was, now = (
        {**run.settings.get("model", {}), "skip_global": run.settings.get("skip_global", False)}
        for run in (before, after)
    )
    for name, title in names.items():
        if was.get(name) != now.get(name):
            yield f"{title}: {_brief(name, was.get(name))} before, {_brief(name, now.get(name))} after"


def _brief(name: str, value: Any) -> str:
    """A setting in a few words: hashes shortened, names in quotes, as `differences` writes them."""
    if value is None:
        return "unknown (not loaded from files)" if name == "checkpoint" else "none"
    return str(value)[:12] if name in ("checkpoint", *_REPAIR) else json.dumps(value)


def _cautions(before: AuditRun, after: AuditRun) -> Iterator[str]:
    """Cautions of both runs; one that only one run has starts with that run's label."""
    shared = [line for line in before.cautions if line in after.cautions]
    yield from shared
    for label, run in zip(label_runs([before.path, after.path]), (before, after), strict=True):
        yield from (f"{label}: {line}" for line in run.cautions if line not in shared)


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


def _settings_changed(before: AuditRun, after: AuditRun) -> tuple[str, ...]:
    """Differences other than the models, which are reported separately, and the samples, which pairing compares."""
    lines = differences(before.settings, after.settings)
    return (*(line for line in lines if not line.startswith(_SAID_ELSEWHERE)), *_judges_changed(before, after))


def _judges_changed(before: AuditRun, after: AuditRun) -> list[str]:
    """What judges of the same name were set otherwise, e.g. another revision or rubric: they may judge differently."""
    was, now = (
        {judge["name"]: judge.get("settings", {}) for judge in run.settings["judges"]} for run in (before, after)
    )
    shared = [name for name in was if name in now]
    return differences(
        {"judges": {name: was[name] for name in shared}}, {"judges": {name: now[name] for name in shared}}
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


def _paired_scores(pairing: _Pairing, metric: Metric, judge: str) -> PairedScores:
    chosen = np.array([s.kind in metric.kinds for s in pairing.before.samples])[pairing.before_rows]
    before, after = (
        _cut(table, rows[chosen], pairing.exit_layers, judge, metric.measure)
        for table, rows in ((pairing.before, pairing.before_rows), (pairing.after, pairing.after_rows))
    )
    # a layer that stopped early has no answer to some samples: those are no pair, and not unscored either
    in_pair = np.logical_and(*(~np.isnan(side.values) | side.unscored for side in (before, after)))
    return PairedScores(
        before.values,
        after.values,
        (before.unscored | after.unscored) & in_pair,
        exit_layers=pairing.exit_layers,
        bounds=metric.bounds,
    )


def _cut(table: ScoreTable, rows: npt.NDArray[np.intp], layers: Sequence[int], judge: str, measure: str) -> Scores:
    columns = [table.exit_layers.index(layer) for layer in layers]
    cells = np.ix_(rows, np.array(columns, dtype=np.intp))
    found = table.scores.get((judge, measure))
    if found is None:  # the judge had nothing to judge, e.g. no picture questions
        shape = len(rows), len(columns)
        return Scores(values=np.full(shape, np.nan), unscored=np.zeros(shape, dtype=np.bool_))
    return Scores(values=found.values[cells], unscored=found.unscored[cells])


def _layer_rows(metric: Metric, judge: str, scores: PairedScores) -> list[Difference]:
    found = scores.layers()
    adjusted = holm([difference.p_value for difference in found.values()])
    return [
        Difference(metric=metric.name, judge=judge, place=layer, p_adjusted=p_adjusted, **vars(difference))
        for (layer, difference), p_adjusted in zip(found.items(), adjusted, strict=True)
    ]
