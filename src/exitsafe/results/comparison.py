"""Compares a run with an earlier one, paired: two finished runs in, differences with intervals and tests out.

Only what both runs have is compared: samples with the same id and the same content, at the same exit layers, by the
same judge. Everything else is counted and left out. Models whose exits do not mean the same are refused; a changed
model is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from exitsafe.errors import InputError, RunError
from exitsafe.results.metrics import BY_NAME, METRICS, Metric, as_noun, as_opening, judge_of
from exitsafe.results.numbers import amount, change, count, exits_named, is_rate, listed
from exitsafe.results.run import AuditRun, label_runs, load_run
from exitsafe.stats import PairedDifference, PairedScores, holm
from exitsafe.store.files import write_json
from exitsafe.store.fingerprint import differences
from exitsafe.store.reading import Judges
from exitsafe.store.scores import ScoreTable
from exitsafe.untrusted import JsonObject

_MUST_AGREE = {
    "family": "families",
    "encoder": "encoders",
    "num_layers": "encoder depths",
    "default_exit": "default exits",
}
_MODEL = {
    "checkpoint": "base checkpoint",
    "name": "model name",
    "dtype": "dtype",
    "quantization": "quantization",
    "skip_global": "skip_global",
}
"""What differs only if the model was changed, weights first."""
_REPAIR = {"adapter": "adapter", "translators": "translators"}
_REPORTED_ELSEWHERE = (
    *(f"{prefix}{name}{end}" for name in (*_MODEL, *_REPAIR) for prefix in ("", "model.") for end in (" ", ".")),
    "model.family ", "model.encoder ", "model.num_layers ", "model.default_exit ",
    "model.server.", "data.", "trained_on", "exit_layers ", "judges ",
)  # fmt: skip


LEVEL = 0.05
LOWER, HIGHER, NOT_SHOWN = "lower", "higher", "not shown to differ"
VERBS = {LOWER: "fell", HIGHER: "rose", NOT_SHOWN: "was not shown to change"}


@dataclass(frozen=True, kw_only=True)
class Difference(PairedDifference):
    """The difference of one metric at one exit layer or in one bin.

    Args:
        metric: As in summary.json.
        judge: The judge whose verdicts count; "" for what the audit itself counts.
        place: The exit layer, or the bin's name (`early`, `middle`, `late`, `average`).
        p_adjusted: p_value by Holm over the layers of this metric; None for bins.
    """

    metric: str
    judge: str
    place: int | str
    p_adjusted: float | None

    @property
    def outcome(self) -> str:
        """What the test shows, over exits with Holm's correction: `LOWER`, `HIGHER` or `NOT_SHOWN`."""
        if (self.p_value if self.p_adjusted is None else self.p_adjusted) >= LEVEL:
            return NOT_SHOWN
        return LOWER if self.difference < 0 else HIGHER

    @property
    def values(self) -> str:
        """Before and after, e.g. `90.0% to 2.0%`."""
        return f"{amount(self.metric, self.before)} to {amount(self.metric, self.after)}"

    @property
    def evidence(self) -> str:
        """What the change rests on, e.g. `change -17.7 points, 95% interval -22.7 to -12.7, n=100`."""
        unit = " points" if is_rate(self.metric) else ""
        low, value, high = (change(self.metric, each) for each in (self.low, self.difference, self.high))
        return f"change {value}{unit}, 95% interval {low} to {high}, {count(self.n, self.unscored)}"


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """A metric that could not be compared at a layer because no pair has two scores."""

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
        models_changed: How the base models differ (weights, name, precision), one line each. The runs are still
            compared, but part of a change may come from that.
        repairs_changed: How the adapters and translators differ, which is usually the point of a comparison.
        cautions: Cautions about the numbers of either run, e.g. samples that were trained on.
        titles: The title of each compared metric, which depends on its judge.
        exit_layers: Layers audited in both.
        num_samples: Samples in both.
        only_before, only_after: Samples left out because the other run lacks them.
        changed: Samples left out because the same id asks something else in the other run.
        settings_changed: Which settings differ between the two audits, one line each: decoding, versions, judges'
            settings. The runs are still compared; the reader decides whether that is fair.
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

    def average(self, metric: str) -> Difference | None:
        """A metric's mean over the three bins; None where it was not compared."""
        return next((row for row in self.bins if (row.metric, row.place) == (metric, "average")), None)

    def exits(self, metric: str, outcome: str) -> list[int]:
        """The exits at which a metric's test has this outcome."""
        return [int(row.place) for row in self.layers if row.metric == metric and row.outcome == outcome]

    def by_exit(self, metric: str) -> str:
        """A metric exit by exit, e.g. `lower at exits 1, 2 and not shown to differ at exit 3`."""
        found = {outcome: self.exits(metric, outcome) for outcome in (LOWER, HIGHER, NOT_SHOWN)}
        return listed([f"{outcome} at {exits_named(exits)}" for outcome, exits in found.items() if exits])

    def title(self, metric: str) -> str:
        """A metric's title, compared or not."""
        return self.titles.get(metric, BY_NAME[metric].title)

    @property
    def headline(self) -> str:
        """What changed, in a sentence: attack success on average and by exit, then what it cost."""
        average, title = self.average("asr"), as_opening(self.title("asr"))
        if average is None:
            return f"{title} was not measured in both runs; {self.cost}."
        values = f"from {average.values} (" if average.outcome != NOT_SHOWN else f"({average.values}, "
        said = f"{VERBS[average.outcome]} {values}{average.evidence})"
        return f"{title} {self.where} {said}: {self.by_exit('asr')}; {self.cost}."

    @property
    def where(self) -> str:
        """What an average is over, for a sentence."""
        is_one = len(self.exit_layers) == 1
        return f"at exit {self.exit_layers[0]}, the only one in both," if is_one else "averaged over exits"

    @property
    def cost(self) -> str:
        """What became of over-refusal and VQA accuracy, averaged over exits; part of a sentence."""
        said, others = [], dict[str, list[str]]()
        for metric in ("over_refusal", "vqa_accuracy"):
            row, title = self.average(metric), as_noun(self.title(metric))
            if row is not None and row.outcome != NOT_SHOWN:
                said.append(f"{title} {VERBS[row.outcome]} from {row.values}")
            else:
                others.setdefault("not measured in both" if row is None else "not shown to change", []).append(title)
        said += [f"{listed(titles)} {'was' if len(titles) == 1 else 'were'} {what}" for what, titles in others.items()]
        return listed(said)

    def to_dict(self) -> JsonObject:
        """A JSON object, `layers` and `bins` shaped as in summary.json."""
        content = {"headline": self.headline, **asdict(self)}
        layers: dict[int | str, JsonObject] = {layer: {} for layer in self.exit_layers}
        bins: dict[int | str, JsonObject] = {row.place: {} for row in self.bins}
        for found, rows in ((layers, content["layers"]), (bins, content["bins"])):
            for row in rows:
                found[row.pop("place")][row.pop("metric")] = row
        content["layers"] = [{"exit_layer": layer, "metrics": rows} for layer, rows in layers.items()]
        content["bins"] = {name: {"metrics": rows} for name, rows in bins.items()}
        return content

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        write_json(Path(path), self.to_dict())


def compare(before: AuditRun | str | Path, after: AuditRun | str | Path) -> Comparison:
    """Compare two audits, paired by sample and exit layer.

    Args:
        before, after: Finished runs or their directories. Weights may differ; samples and layers should not.

    Raises:
        InputError: If the models' exits do not mean the same: another family, encoder, depth or default exit.
        RunError: If a directory is not a finished run, or the runs have no sample or no exit layer in common.
    """
    before = before if isinstance(before, AuditRun) else load_run(before)
    after = after if isinstance(after, AuditRun) else load_run(after)
    check_comparable([before, after])
    known = after if before.is_served else before
    num_layers = known.num_layers
    pairing = Pairing.of(before.score_table(), after.score_table(), num_layers=num_layers)
    shared = shared_judges(before, after)
    # times of two runs cannot be paired
    judges = {metric: judge_of(metric, shared) for metric in METRICS if metric.name != "seconds"}
    found = {metric: pairing.differences(metric, judge) for metric, judge in judges.items() if judge is not None}
    measured = {metric.name for metric in found}
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        num_layers=num_layers,
        default_exit=known.default_exit,
        models_changed=models_changed(before, after),
        repairs_changed=repairs_changed(before, after),
        cautions=tuple(cautions(before, after)),
        titles={metric.name: before.title(metric.name, judges[metric]) for metric in found},
        exit_layers=pairing.before.exit_layers,
        num_samples=len(pairing.before.samples),
        only_before=pairing.only_before,
        only_after=pairing.only_after,
        changed=pairing.changed,
        settings_changed=settings_changed(before, after),
        metrics_left_out=tuple(name for name in _metrics_in(before, after) if name not in measured),
        unscored=tuple(row for each in found.values() for row in each.unscored),
        layers=tuple(row for each in found.values() for row in each.layers),
        bins=tuple(row for each in found.values() for row in each.bins),
    )


@dataclass(frozen=True, kw_only=True)
class Differences:
    """A metric's differences by exit layer and by bin, and the layers where no pair has two scores."""

    layers: tuple[Difference, ...]
    bins: tuple[Difference, ...]
    unscored: tuple[Unscored, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """Two score tables cut to the samples and exit layers that both have, in the order of before.

    Args:
        before, after: The tables; row i of both is the same sample.
        num_layers: The encoder's number of blocks.
        only_before, only_after, changed: Samples left out, as in `Comparison`.
    """

    before: ScoreTable
    after: ScoreTable
    num_layers: int
    only_before: int
    only_after: int
    changed: int

    @classmethod
    def of(cls, before: ScoreTable, after: ScoreTable, *, num_layers: int) -> Pairing:
        """Pair two tables by sample and exit layer.

        Raises:
            RunError: If they have no sample or no exit layer in common.
        """
        was, now = ({sample.id: row for row, sample in enumerate(table.samples)} for table in (before, after))
        shared = [sample_id for sample_id in was if sample_id in now]
        paired = [i for i in shared if before.samples[was[i]].digest == after.samples[now[i]].digest]
        was_at, now_at = before.exit_layers, after.exit_layers
        layers = [layer for layer in was_at if layer in now_at]
        if not paired:
            raise RunError(
                f"the two runs have no sample in common ({len(shared)} ids are the same but their content differs); "
                "audit both with the same suites, split and seed"
            )
        if not layers:
            claim = "; for a served model, claim one with --exit-layer" if (0,) in (was_at, now_at) else ""
            raise RunError(f"the two runs have no exit layer in common; audit both at the same layers{claim}")
        return cls(
            before=before.cut([was[i] for i in paired], layers),
            after=after.cut([now[i] for i in paired], layers),
            num_layers=num_layers,
            only_before=len(was) - len(shared),
            only_after=len(now) - len(shared),
            changed=len(shared) - len(paired),
        )

    def differences(self, metric: Metric, judge: str, *, unscored_as: tuple[float, float] | None = None) -> Differences:
        """The differences of one metric, by one judge.

        Args:
            metric: The metric.
            judge: The judge whose scores count.
            unscored_as: The scores to use for unscored answers before and after; None leaves such pairs out.
        """
        rows = self.before.of_kinds(metric.kinds)
        before, after = (table.scores_of(judge, metric.measure).of_samples(rows) for table in (self.before, self.after))
        if unscored_as is not None:
            before, after = before.filled(unscored_as[0]), after.filled(unscored_as[1])
        # a layer that stopped early did not answer some samples: those are not pairs, and not unscored either
        in_pair = before.is_asked & after.is_asked
        scores = PairedScores(
            before.values,
            after.values,
            (before.unscored | after.unscored) & in_pair,
            exit_layers=self.before.exit_layers,
            bounds=metric.bounds,
        )
        layers = scores.layers()
        adjusted: list[float | None] = [*holm([found.p_value for found in layers.values()])]
        name = metric.name
        return Differences(
            layers=tuple(
                Difference(metric=name, judge=judge, place=layer, p_adjusted=p, **vars(found))
                for (layer, found), p in zip(layers.items(), adjusted, strict=True)
            ),
            bins=tuple(
                Difference(metric=name, judge=judge, place=bin_name, p_adjusted=None, **vars(found))
                for bin_name, found in scores.bins(self.num_layers).items()
            ),
            unscored=tuple(
                Unscored(metric=name, judge=judge, exit_layer=layer, pairs=count)
                for layer, count in scores.unscored_layers().items()
            ),
        )


def against_default(run: AuditRun) -> dict[str, list[Difference]]:
    """Each other exit of a run against its default one, by metric; the default exit is before."""
    found: dict[str, list[Difference]] = {}
    for entry in run.summary["against_default"]["layers"]:
        for metric, test in entry["metrics"].items():
            content = {{"at_default": "before", "at_layer": "after"}.get(name, name): test[name] for name in test}
            row = Difference(metric=metric, judge="", place=entry["exit_layer"], **content)
            found.setdefault(metric, []).append(row)
    return found


def shared_judges(before: AuditRun, after: AuditRun) -> Judges:
    """The judges of before that measured the same in after; the first judge that has a measure reports it."""
    return tuple(judge for judge in before.judges if judge in after.judges)


def check_comparable(runs: Sequence[AuditRun]) -> None:
    """Check that an exit layer means the same thing in all runs.

    Raises:
        InputError: If they are of different families, encoders, encoder depths or default exits.
    """
    for name, what in _MUST_AGREE.items():
        # of a served model nothing is known; the exit that it is claimed to run is compared
        known = (run for run in runs if not run.is_served)
        found = sorted({str(run.settings["model"].get(name)) for run in known})
        if len(found) > 1:
            raise InputError(
                f"these runs have the {what} {' and '.join(found)}: their exits are not comparable; "
                "give runs of the same model, or make separate reports"
            )


def models_changed(before: AuditRun, after: AuditRun) -> tuple[str, ...]:
    """How the base models differ (weights, name, precision), one line each."""
    return tuple(_changes(before, after, _MODEL))


def repairs_changed(before: AuditRun, after: AuditRun) -> tuple[str, ...]:
    """How the adapters and translators differ, one line each."""
    return tuple(_changes(before, after, _REPAIR))


def _changes(before: AuditRun, after: AuditRun, names: Mapping[str, str]) -> Iterator[str]:
    """Differences between two models, one line each, e.g. `adapter: none before, 9f86d081884c after`."""
    was, now = (
        {**run.settings.get("model", {}), "skip_global": run.settings.get("skip_global", False)}
        for run in (before, after)
    )
    for name, title in names.items():
        if was.get(name) != now.get(name):
            yield f"{title}: {_brief(name, was.get(name))} before, {_brief(name, now.get(name))} after"


def _brief(name: str, value: object) -> str:
    """A setting in a few words: hashes shortened, names in quotes as in `differences`."""
    if value is None:
        return "unknown (not loaded from files)" if name == "checkpoint" else "none"
    return str(value)[:12] if name in ("checkpoint", *_REPAIR) else json.dumps(value)


def cautions(before: AuditRun, after: AuditRun) -> Iterator[str]:
    """Cautions about both runs; one that applies to one run only starts with that run's label."""
    shared = [line for line in before.cautions if line in after.cautions]
    yield from shared
    for label, run in zip(label_runs([before.path, after.path]), (before, after), strict=True):
        yield from (f"{label}: {line}" for line in run.cautions if line not in shared)


def settings_changed(before: AuditRun, after: AuditRun) -> tuple[str, ...]:
    """Differences other than the models, which are reported separately, and the samples, which pairing compares."""
    lines = differences(before.settings, after.settings)
    if before.is_served != after.is_served:  # of a served model the rest is unknown, not different
        lines = [line for line in lines if not line.startswith(("model.", "prompts.", "versions.", "engine."))]
    return (*(line for line in lines if not line.startswith(_REPORTED_ELSEWHERE)), *_judges_changed(before, after))


def _judges_changed(before: AuditRun, after: AuditRun) -> list[str]:
    """Changed settings of judges with the same name, e.g. another revision or rubric, which may change verdicts."""
    was, now = (
        {judge["name"]: judge.get("settings", {}) for judge in run.settings["judges"]} for run in (before, after)
    )
    shared = [name for name in was if name in now]
    return differences(
        {"judges": {name: was[name] for name in shared}}, {"judges": {name: now[name] for name in shared}}
    )


def _metrics_in(*runs: AuditRun) -> list[str]:
    """Metrics for which either run has results, except times."""
    found = {name for run in runs for layer in run.summary["layers"] for name in layer["metrics"]}
    return [metric.name for metric in METRICS if metric.name in found - {"seconds"}]
