"""`AuditRun`: a finished run. `exitsafe.store.directory` describes its folder.

A run may be damaged or come from a stranger: everything is checked before it is used, and every number is computed from
the verdicts. summary.json is for people and other programs; nothing here relies on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.results.metrics import BY_NAME, METRICS, NO_PROXY, judge_of, proxies_in, title_of
from exitsafe.results.stopping import stopping_of
from exitsafe.results.summary import Summary, summarise
from exitsafe.stats import Estimate, mean_estimate
from exitsafe.store.fingerprint import Settings
from exitsafe.store.reading import Judges, names_and_measures, read_scores
from exitsafe.store.scores import OWN, ScoreTable, score_table
from exitsafe.store.tables import (
    REMEDY,
    SampleInfo,
    read_responses,
    read_samples,
    read_verdicts,
)
from exitsafe.untrusted import UnreadableError


@dataclass(frozen=True, kw_only=True)
class WorstExit(Estimate):
    """An exit chosen as the worst on one half of the samples and measured on the other.

    `swapped` has the halves in each other's place; None if that half could not be measured.
    """

    exit_layer: int
    chosen_on: int
    swapped: WorstExit | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AuditRun:
    """A finished audit on disk; responses and verdicts are read on demand.

    Args:
        path: The run directory.
        settings: What was audited and how, with hashes: model, data, exit_layers, decoding, judges.
        origin: How the run was started, e.g. suites, split, seed and limit, to recreate its samples.
        summary: Every metric, computed from the verdicts; the same as in summary.json.
        table: All scores, if already read.
    """

    path: Path
    settings: Settings
    origin: Settings
    summary: Summary
    table: ScoreTable | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """What was audited, and the range of the main metrics over exits."""
        model, samples = self.settings["model"], self.settings["data"]["samples"]
        exits, judges = ", ".join(map(str, self.exit_layers)), ", ".join(name for name, _ in self.judges)
        lines = [f"AuditRun {self.path}", f"  {model['name']}: {samples} samples at exits {exits}, judged by {judges}"]
        for metric in ("asr", "over_refusal", "vqa_accuracy"):
            found = {layer["exit_layer"]: layer["metrics"].get(metric) for layer in self.summary["layers"]}
            rates = {exit_layer: each["value"] for exit_layer, each in found.items() if each and each["n"]}
            if rates:
                lowest, highest = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
                span = f"{rates[lowest]:.1%} at every exit"
                if rates[lowest] < rates[highest]:
                    span = f"{rates[lowest]:.1%} (exit {lowest}) to {rates[highest]:.1%} (exit {highest})"
                lines.append(f"  {self.title(metric)}: {span}")
        return "\n".join(lines)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layers audited, ascending."""
        return tuple(self.settings["exit_layers"])

    @property
    def num_layers(self) -> int:
        """Blocks of the encoder; 0 if unknown, as for a served model."""
        return int(self.summary["num_layers"])

    @property
    def default_exit(self) -> int:
        """The exit of the untouched model."""
        return int(self.summary["default_exit"])

    @property
    def is_served(self) -> bool:
        """Whether a served model was audited: its run has one exit, claimed or 0, and depth and default exit are
        unknown (0)."""
        return self.num_layers == 0

    def estimates(self, metric: str, judge: str | None = None) -> dict[int | str, Estimate]:
        """A metric by exit layer, then by bin; by the judge that reports it, or by another."""
        results = self.summary if judge is None else self.summary["judges"].get(judge, {})
        places = [(entry["exit_layer"], entry["metrics"]) for entry in results.get("layers", ())]
        places += [(name, entry["metrics"]) for name, entry in results.get("bins", {}).items()]
        return {place: Estimate(**found[metric]) for place, found in places if metric in found}

    def at_exits(self, metric: str, judge: str | None = None) -> dict[int, Estimate]:
        """`estimates` without the bins."""
        return {place: found for place, found in self.estimates(metric, judge).items() if isinstance(place, int)}

    def worst(self, metric: str) -> WorstExit | None:
        """The worst exit of a metric; None where there is too little to choose one by."""
        found = self.summary["worst"].get(metric)
        if found is None:
            return None
        swapped = found["swapped"] and WorstExit(**found["swapped"])
        return WorstExit(**{**found, "swapped": swapped})

    @property
    def judges(self) -> Judges:
        """Judges' names and measures; the first judge that has a measure reports it."""
        return names_and_measures(self.settings)

    @property
    def proxies(self) -> dict[str, Mapping[str, str]]:
        """By name, the judges that are proxies, and what they count for each measure."""
        return proxies_in(self.settings.get("judges", ()))

    def proxy_of(self, metric: str, judge: str | None = None) -> Mapping[str, str]:
        """What the judge that reports a metric, or another judge, counts instead; empty if it reads answers."""
        return self.proxies.get(judge or judge_of(BY_NAME[metric], self.judges) or "", NO_PROXY)

    def title(self, metric: str, judge: str | None = None) -> str:
        """A metric's title for the judge that reports it, or for another, e.g. `Requests not refused (proxy)`."""
        return title_of(BY_NAME[metric], self.proxy_of(metric, judge))

    @property
    def cautions(self) -> tuple[str, ...]:
        """Cautions about this run's numbers, one line each; shown in all output."""
        return tuple(_cautions(self))

    def responses(self) -> list[Response]:
        """All responses: in the order of the samples, then by exit layer."""
        return read_responses(self.path / "responses.parquet")

    def verdicts(self) -> list[Verdict]:
        """All verdicts: in the order of the responses, then of the judges."""
        return read_verdicts(self.path / "verdicts.parquet")

    def samples(self) -> list[SampleInfo]:
        """Id, kind, category, source and digest of each sample; prompts, images, videos and audio are not recorded."""
        return read_samples(self.path / "responses.parquet")

    def score_table(self) -> ScoreTable:
        """All scores on one grid of samples and layers."""
        if self.table is not None:
            return self.table
        return score_table(self.samples(), self.exit_layers, self.responses(), self.verdicts())

    def mean_over_layers(self, metric: str, exit_layers: Sequence[int]) -> Estimate:
        """A metric's mean over some of the audited layers, with a bootstrap interval clustered by sample.

        Raises:
            RunError: If the run has no such metric or layer.
        """
        wanted = next((known for known in METRICS if known.name == metric), None)
        judge = None if wanted is None else judge_of(wanted, self.judges)
        table = self.score_table()
        scores = None if wanted is None else table.scores.get((judge or OWN, wanted.measure))
        if wanted is None or scores is None:
            raise RunError(f"{self.path} has no metric {metric!r}; audit it with a judge that measures it")
        if missing := set(exit_layers) - set(self.exit_layers):
            raise RunError(
                f"{self.path} has no exit layer {min(missing)}; it has {', '.join(map(str, self.exit_layers))}"
            )
        scores = scores.of_samples(table.of_kinds(wanted.kinds))
        columns = [self.exit_layers.index(layer) for layer in exit_layers]
        return mean_estimate(scores.values[:, columns], scores.unscored[:, columns], bounds=wanted.bounds)


def _cautions(run: AuditRun) -> Iterator[str]:
    trained_on = run.settings.get("trained_on")
    if trained_on is not None and trained_on["samples"]:
        yield trained_on_line(trained_on["samples"], trained_on["of"])
    for judge, wanted in run.origin.get("replaced_judges", {}).items():
        if judge in dict(run.judges):  # not so if an earlier start, which saved nothing, used the default judge
            yield f"the default judge, {wanted}, was not available when this run was made; {judge} judged instead"
    for judge, counted in run.proxies.items():
        measured = [counted[measure] for measure in dict(run.judges)[judge] if measure in counted]
        yield (
            f"{judge} is a proxy: it counts {' and '.join(measured)} and does not read what an answer means; confirm "
            "its numbers with a judge that does: exitsafe judge RUN --judge NAME"
        )


def trained_on_line(number: int, of: int) -> str:
    """How many of a run's samples its repair was trained on."""
    return (
        f"{number:,} of {of:,} samples were in the training data of the adapter or translators: results on them show "
        "what was learned, not how the model does on other samples"
    )


def load_run(path: str | Path) -> AuditRun:
    """Open a finished run and check its integrity.

    Raises:
        RunError: If the folder is missing or not a run, or its audit is not finished; if a file is missing, damaged or
            changed since the run finished, or results are missing, duplicated or out of range.
    """
    path = Path(path)
    head, table = read_scores(path)
    try:
        summary = summarise_run(table, head["settings"])
    except UnreadableError as error:
        raise RunError(f"{path}/{error}; {REMEDY}") from error
    return AuditRun(path=path, settings=head["settings"], origin=head["origin"], summary=summary, table=table)


def summarise_run(table: ScoreTable, settings: Settings) -> Summary:
    """The content of summary.json.

    Raises:
        UnreadableError: If an exit lacks answers although it did not stop early.
    """
    stopping = stopping_of(table, settings)
    return summarise(table, model=settings["model"], judges=names_and_measures(settings), stopping=stopping)


def title_in(runs: Iterable[AuditRun], metric: str) -> str:
    """A metric's title in these runs; several if a proxy judge reports it in some."""
    measured = [run for run in runs if any(metric in row["metrics"] for row in run.summary["layers"])]
    return " / ".join(dict.fromkeys(run.title(metric) for run in measured)) or BY_NAME[metric].title


def label_runs(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with parent folders as needed to make them unique, or else a number.

    >>> label_runs([Path("a/before"), Path("a/after")]), label_runs([Path("a/run"), Path("b/run")])
    (['before', 'after'], ['a/run', 'b/run'])
    """
    resolved = [path.resolve() for path in paths]
    labels = [path.name or "run" for path in resolved]
    for depth in range(2, 1 + max((len(path.parts) for path in resolved), default=0)):
        if len(set(labels)) == len(labels):
            break
        labels = [
            "/".join(path.parts[1:][-depth:]) if labels.count(label) > 1 else label
            for path, label in zip(resolved, labels, strict=True)
        ]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:i].count(label) + 1})"
        for i, label in enumerate(labels)
    ]
