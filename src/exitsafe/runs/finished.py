"""A finished run: its folder in, what it holds out. Writes nothing; `directory.py` says what lies in the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.runs.fingerprint import Settings
from exitsafe.runs.metrics import METRICS, judge_of
from exitsafe.runs.scores import OWN, ScoreTable, score_table
from exitsafe.runs.summary import Summary
from exitsafe.runs.tables import SampleInfo, read_responses, read_samples, read_verdicts
from exitsafe.stats import Estimate, mean_estimate

FORMAT = 2
Judges = tuple[tuple[str, tuple[str, ...]], ...]
"""Names and measures, in the order of the command line."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditRun:
    """A finished audit on disk. Light: responses and verdicts are read when asked for.

    Args:
        path: The run directory.
        settings: What the run is of and how it was made, with hashes: model, data, exit_layers, decoding, judges.
        origin: What the caller noted to make the samples again, e.g. suites, split, seed and limit.
        summary: The content of summary.json.
    """

    path: Path
    settings: Settings
    origin: Settings
    summary: Summary

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layers audited, ascending."""
        return tuple(self.settings["exit_layers"])

    @property
    def judges(self) -> Judges:
        """Judges' names and measures; the first that has a measure speaks for it."""
        return names_and_measures(self.settings)

    def responses(self) -> list[Response]:
        """All responses: in the order of the samples, then by exit layer."""
        return read_responses(self.path / "responses.parquet")

    def verdicts(self) -> list[Verdict]:
        """All verdicts: in the order of the responses, then of the judges."""
        return read_verdicts(self.path / "verdicts.parquet")

    def samples(self) -> list[SampleInfo]:
        """Id, kind, category, source and digest of each sample; prompts and images are not kept."""
        return read_samples(self.path / "responses.parquet")

    def score_table(self) -> ScoreTable:
        """All scores on one grid of samples and layers."""
        return score_table(self.samples(), self.exit_layers, self.responses(), self.verdicts())

    def mean_over_layers(self, metric: str, exit_layers: Sequence[int]) -> Estimate:
        """A metric's mean over some of the audited layers, by its judge, with the bootstrap clustered by sample.

        Raises:
            RunError: If the run has no such metric or layer.
        """
        wanted = next((known for known in METRICS if known.name == metric), None)
        judge = None if wanted is None else judge_of(wanted, self.judges)
        table = self.score_table()
        scores = None if wanted is None else table.scores.get((judge or OWN, wanted.measure))
        if wanted is None or scores is None:
            raise RunError(f"{self.path} has no metric {metric!r}")
        if missing := set(exit_layers) - set(self.exit_layers):
            raise RunError(
                f"{self.path} has no exit layer {min(missing)}; it has {', '.join(map(str, self.exit_layers))}"
            )
        scores = scores.of_samples(table.of_kinds(wanted.kinds))
        columns = [self.exit_layers.index(layer) for layer in exit_layers]
        return mean_estimate(scores.values[:, columns], scores.unscored[:, columns], bounds=wanted.bounds)


def load_run(path: str | Path) -> AuditRun:
    """Open a finished run.

    Raises:
        RunError: If the folder is missing, holds no run, or its audit is not finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path} is no folder; give the --out of an audit")
    head = read_head(path)
    if not (path / "summary.json").exists():
        raise RunError(f"{path} is not finished; start its audit again with the same settings to go on")
    summary = _read_json(path / "summary.json")
    return AuditRun(path=path, settings=head["settings"], origin=head["origin"], summary=summary)


def judges_of(path: str | Path) -> tuple[str, ...]:
    """The names of a run's judges, finished or not.

    Raises:
        RunError: If there is no run.
    """
    return tuple(name for name, _ in names_and_measures(read_head(Path(path))["settings"]))


def origin_of(path: str | Path) -> Settings:
    """What a run's callers noted, finished or not.

    Raises:
        RunError: If there is no run.
    """
    origin: Settings = read_head(Path(path))["origin"]
    return origin


def names_and_measures(settings: Settings) -> Judges:
    """Of the judges in a run's settings."""
    return tuple((judge["name"], tuple(judge["measures"])) for judge in settings["judges"])


def read_head(path: Path) -> Mapping[str, Any]:
    """The content of run.json: format, settings, origin.

    Raises:
        RunError: If there is none of this version's format.
    """
    if not (path / "run.json").exists():
        raise RunError(f"{path} is no run: it has no run.json; give the --out of an audit")
    head = _read_json(path / "run.json")
    if head.get("format") != FORMAT or "settings" not in head:
        if (path / "metrics.jsonl").exists():
            raise RunError(f"{path} is a training run; give the --out of an audit")
        raise RunError(f"{path}/run.json is not of this version's format ({FORMAT}); audit again into a new folder")
    return head


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove the run and audit again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object; remove the run and audit again")
    return content
