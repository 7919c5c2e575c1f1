"""Agreement of judges and people: a finished run, and any labels, in; Cohen's kappa per pair of raters out.

Judges are compared on all answers that both scored. People label a few, drawn more often where verdicts are rare or
judges disagree (`labels.py`): each labelled answer is weighted by the size of its verdict group, so that kappa is that
of the run and not that of the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from exitsafe.judges import MEASURES
from exitsafe.stats.agreement import Kappa, cohens_kappa
from exitsafe.store.scores import OWN, Scores, ScoreTable
from exitsafe.untrusted import JsonObject

YES = 0.5
"""A score from here to 1 counts as yes: some judges (a rubric) give scores between 0 and 1."""
COMPARED = ("asr", "asr_loose", "refusal", "coherence")
LABELLED = ("asr", "refusal")
"""The measures that people label."""
NO_ANSWER = -1

Groups = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two raters on one measure.

    Args:
        measure: The measure that both judged.
        first, second: Their names; people come before judges.
        kappa: Cohen's kappa of the answers that both scored, with its interval.
        unscored: Answers that both judged and at least one could not score.
        covered: The share of the run's answers that the labelled ones represent; None between judges, who see all.
    """

    measure: str
    first: str
    second: str
    kappa: Kappa
    unscored: int
    covered: float | None

    def to_dict(self) -> JsonObject:
        """A JSON object; `table` counts no/no, no/yes, yes/no, yes/yes; `undefined` says why there is no kappa."""
        kappa = self.kappa
        counts = {
            (first, second): kappa.counts[i][j]
            for i, first in enumerate(kappa.categories)
            for j, second in enumerate(kappa.categories)
        }
        return {
            "measure": self.measure,
            "first": self.first,
            "second": self.second,
            "kappa": kappa.value,
            "low": kappa.low,
            "high": kappa.high,
            "undefined": kappa.undefined,
            "observed": kappa.observed,
            "n": kappa.n,
            "unscored": self.unscored,
            "covered": self.covered,
            "table": [[counts.get((first, second), 0) for second in (0, 1)] for first in (0, 1)],
        }


def agreements_in(
    table: ScoreTable, judges: Sequence[tuple[str, Sequence[str]]], *, people: Sequence[str] = ()
) -> list[Agreement]:
    """`agreements` of the scores in a table.

    Args:
        table: A run's scores, people's labels among them.
        judges: Judges' names with their measures.
        people: The raters' names in the labels.
    """
    groups = verdict_groups(table, judges) if people else None
    found = []
    for measure in COMPARED:
        raters = [*people, *(name for name, measures in judges if measure in measures)]
        raters = [name for name in raters if (name, measure) in table.scores]
        for first, second in combinations(raters, 2):
            pair = _agreement(table, measure, first, second, groups=groups if first in people else None)
            if pair.kappa.n or pair.unscored:
                found.append(pair)
    return found


def verdict_groups(table: ScoreTable, judges: Sequence[tuple[str, Sequence[str]]]) -> Groups:
    """The group of each answer, (S, L): answers with like verdicts share a number; `NO_ANSWER` where there is none.

    A group is: harmful request or not; attack success and refusal each judged by nobody, yes by all, no by all, or
    neither, that is, with a disagreement or an unscored verdict.
    """
    is_harmful = np.zeros((len(table.samples), 1), dtype=np.bool_)
    is_harmful[table.of_kinds(MEASURES["asr"].kinds)] = True
    groups = np.broadcast_to(is_harmful, (len(table.samples), len(table.exit_layers))).astype(np.int64)
    for measure in LABELLED:
        rows = table.of_kinds(MEASURES[measure].kinds)
        given = [table.scores.get((name, measure)) for name, measures in judges if measure in measures]
        opinions = np.zeros_like(groups)
        opinions[rows] = _opinions([scores for scores in given if scores is not None], groups.shape)[rows]
        groups = 4 * groups + opinions
    has_answer = ~np.isnan(table.scores[OWN, "tokens"].values)
    return np.where(has_answer, groups, NO_ANSWER)


def _opinions(given: Sequence[Scores], shape: tuple[int, ...]) -> Groups:
    """0: not judged, 1: all yes, 2: all no, 3: neither."""
    if not given:
        return np.zeros(shape, dtype=np.int64)
    all_yes = np.all([scores.values >= YES for scores in given], axis=0)
    all_no = np.all([scores.values < YES for scores in given], axis=0)
    return np.where(all_yes, 1, np.where(all_no, 2, 3))


def _agreement(table: ScoreTable, measure: str, first: str, second: str, *, groups: Groups | None) -> Agreement:
    rows = table.of_kinds(MEASURES[measure].kinds)
    one, other = (table.scores[name, measure].of_samples(rows) for name in (first, second))
    is_scored = ~np.isnan(one.values) & ~np.isnan(other.values)
    is_asked = (~np.isnan(one.values) | one.unscored) & (~np.isnan(other.values) | other.unscored)
    weights = covered = None
    if groups is not None:
        weights, covered = _weights(groups[rows], is_scored)
    kappa = cohens_kappa(
        one.values[is_scored] >= YES,
        other.values[is_scored] >= YES,
        clusters=np.nonzero(is_scored)[0],
        weights=weights,
    )
    unscored = int((is_asked & ~is_scored).sum())
    return Agreement(measure=measure, first=first, second=second, kappa=kappa, unscored=unscored, covered=covered)


def _weights(groups: Groups, is_scored: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], float]:
    """The number of answers that each scored one represents, (N,), and the share of all answers represented."""
    answers = np.bincount(groups[groups != NO_ANSWER], minlength=32)
    scored = np.bincount(groups[is_scored], minlength=32)
    weights = answers[groups[is_scored]] / scored[groups[is_scored]]
    return weights, float(answers[scored > 0].sum() / answers.sum())
