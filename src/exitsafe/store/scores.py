"""Verdicts as tables: (samples, layers) arrays of scores per judge and measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exitsafe.records import Kind, Response, Verdict
from exitsafe.store.tables import SampleInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One judge's scores of one measure.

    Args:
        values: (S, L); NaN where there is no score.
        unscored: (S, L); True where the judge gave a reason instead of a score.
    """

    values: npt.NDArray[np.float64]
    unscored: npt.NDArray[np.bool_]

    def of_samples(self, chosen: npt.NDArray[np.intp]) -> Scores:
        """The rows of some samples."""
        return Scores(values=self.values[chosen], unscored=self.unscored[chosen])

    @property
    def is_asked(self) -> npt.NDArray[np.bool_]:
        """(S, L); False where an exit stopped before the sample, or the judge does not judge such samples."""
        return ~np.isnan(self.values) | self.unscored

    def filled(self, score: float | None) -> Scores:
        """With this score in place of unscored ones; None leaves them out."""
        if score is None:
            return self
        return Scores(values=np.where(self.unscored, score, self.values), unscored=np.zeros_like(self.unscored))


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """All scores of a run on one grid: `samples` are the rows, `exit_layers` the columns."""

    samples: tuple[SampleInfo, ...]
    exit_layers: tuple[int, ...]
    scores: dict[tuple[str, str], Scores]
    """By judge and measure."""

    def of_kinds(self, kinds: Sequence[Kind]) -> npt.NDArray[np.intp]:
        """Row numbers of the samples of these kinds."""
        return np.array([i for i, sample in enumerate(self.samples) if sample.kind in kinds], dtype=np.intp)

    def scores_of(self, judge: str, measure: str) -> Scores:
        """A judge's scores; all missing if it had nothing to judge, e.g. no picture questions."""
        return self.scores.get((judge, measure)) or _no_scores(len(self.samples), len(self.exit_layers))

    def cut(self, rows: Sequence[int], exit_layers: Sequence[int]) -> ScoreTable:
        """Some of its samples and exit layers, in the order given."""
        cells = np.ix_(list(rows), [self.exit_layers.index(layer) for layer in exit_layers])
        return ScoreTable(
            samples=tuple(self.samples[row] for row in rows),
            exit_layers=tuple(exit_layers),
            scores={
                key: Scores(values=found.values[cells], unscored=found.unscored[cells])
                for key, found in self.scores.items()
            },
        )


def _no_scores(num_samples: int, num_layers: int) -> Scores:
    shape = num_samples, num_layers
    return Scores(values=np.full(shape, np.nan), unscored=np.zeros(shape, dtype=np.bool_))


OWN = ""
"""In place of a judge's name: what the audit itself measures."""


def score_table(
    samples: Sequence[SampleInfo],
    exit_layers: Sequence[int],
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
) -> ScoreTable:
    """Arrange verdicts, tokens and seconds on the grid."""
    row_of = {sample.id: row for row, sample in enumerate(samples)}
    column_of = {layer: column for column, layer in enumerate(exit_layers)}
    scores: dict[tuple[str, str], Scores] = {}

    def table_of(judge: str, measure: str) -> Scores:
        if (judge, measure) not in scores:
            scores[judge, measure] = _no_scores(len(samples), len(exit_layers))
        return scores[judge, measure]

    for response in responses:
        cell = row_of[response.sample_id], column_of[response.exit_layer]
        table_of(OWN, "tokens").values[cell] = response.num_tokens
        table_of(OWN, "seconds").values[cell] = response.seconds
    for verdict in verdicts:
        cell = row_of[verdict.sample_id], column_of[verdict.exit_layer]
        found = table_of(verdict.judge, verdict.measure)
        if verdict.score is None:
            found.unscored[cell] = True
        else:
            found.values[cell] = verdict.score
    return ScoreTable(samples=tuple(samples), exit_layers=tuple(exit_layers), scores=scores)
