"""How much worse a run is than another, paired by sample: two runs in, evidence out.

The numbers are those of `exitsafe compare`, with two cautions: a pair that lacks a score counts as the worst change
there is (its answer before as good as can be, after as bad as can be), and the bound of a rate's change is the wider of
the bootstrap's and a score interval's (`rare.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exitsafe.comparison import Comparison, Difference, compare
from exitsafe.gate.evidence import STOPPED, Evidence, Place
from exitsafe.gate.rare import change_margin
from exitsafe.runs import AuditRun
from exitsafe.runs.metrics import METRICS, Metric
from exitsafe.runs.scores import Scores, ScoreTable


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut(AuditRun):
    """A run of which only one judge speaks, with scores that may be filled in."""

    table: ScoreTable

    def score_table(self) -> ScoreTable:
        return self.table


class Regressions:
    """Two runs, compared as often as rules ask and no more.

    Args:
        before: What must not be worsened.
        after: The run at the gate.
        tables: Their scores.
    """

    def __init__(self, before: AuditRun, after: AuditRun, tables: tuple[ScoreTable, ScoreTable]) -> None:
        self.runs = (before, after)
        self.tables = tables
        self._compared: dict[tuple[str | None, float | None], Comparison] = {}

    def compared(self, judge: str | None = None, *, unscored_worsen: float | None = None) -> Comparison:
        """`compare` by one judge or, as it does, by the first of both.

        Args:
            judge: Its name.
            unscored_worsen: 1 counts pairs without a score as the largest worsening, 0 as the largest improvement;
                None leaves them out.
        """
        key = judge, unscored_worsen
        if key not in self._compared:
            before, after = (
                _cut(run, table, judge, None if unscored_worsen is None else abs(unscored_worsen - is_before))
                for is_before, run, table in zip((1, 0), self.runs, self.tables, strict=True)
            )
            self._compared[key] = compare(before, after)
        return self._compared[key]

    def evidence(self, metric: Metric, judge: str | None, *, is_by_bin: bool, layers: Sequence[int]) -> list[Evidence]:
        """How much worse each place became; as for a metric that must be low.

        Raises:
            RunError: If the runs share no sample or no exit.
        """
        plain = self.compared(judge)
        if metric.name not in plain.metrics and not any(row.metric == metric.name for row in plain.unscored):
            who = "no judge" if judge is None else judge
            return [Evidence(place=Place(), missing=f"{who} measured {metric.name} in both runs")]
        stopped = self._stopped_layers() if "harmful" in metric.kinds else set()
        if is_by_bin:
            return list(self._by_bin(metric, judge, layers, has_stopped=bool(stopped & set(layers))))
        return list(self._by_layer(metric, judge, layers, stopped=stopped))

    def _by_layer(
        self, metric: Metric, judge: str | None, layers: Sequence[int], *, stopped: set[int]
    ) -> Iterator[Evidence]:
        rows = self._three(metric, judge)
        lost = {row.exit_layer: row.pairs for row in self.compared(judge).unscored if row.metric == metric.name}
        for layer in layers:
            place = Place(exit_layer=layer)
            if layer not in self.compared(judge).exit_layers:
                yield Evidence(place=place, missing="this exit is not in both runs")
            elif layer in stopped:
                yield Evidence(place=place, missing=STOPPED)
            elif layer in rows:
                yield _evidence(place, metric, rows[layer], samples=rows[layer][0].n + rows[layer][0].unscored)
            elif layer in lost:
                yield Evidence(place=place, unscored=lost[layer], missing="no pair could be scored")
            else:
                yield Evidence(place=place, missing="there is no pair to compare")

    def _by_bin(
        self, metric: Metric, judge: str | None, layers: Sequence[int], *, has_stopped: bool
    ) -> Iterator[Evidence]:
        comparison = self.compared(judge)
        if set(layers) != set(comparison.exit_layers):
            yield Evidence(place=Place(), missing="bins are compared over all exits, the same ones in both runs")
            return
        bins = {place: rows for place, rows in self._three(metric, judge).items() if isinstance(place, str)}
        if not bins:
            yield Evidence(place=Place(), missing="no pair could be scored")
        pairs = max((row.n + row.unscored for row in comparison.layers if row.metric == metric.name), default=0)
        for name, rows in bins.items():
            found = _evidence(Place(bin=name), metric, rows, samples=pairs)
            yield replace(found, missing=STOPPED) if has_stopped else found

    def _three(self, metric: Metric, judge: str | None) -> dict[int | str, tuple[Difference, Difference, Difference]]:
        """Each place's row: over scored pairs, and with the others counted against the model and in its favour."""
        plain = self.compared(judge)
        is_whole = metric.bounds is None or not any(row.unscored for row in plain.rows(metric.name))
        against, favour = (plain if is_whole else self.compared(judge, unscored_worsen=worsen) for worsen in (1.0, 0.0))
        found = [{row.place: row for row in each.rows(metric.name)} for each in (plain, against, favour)]
        return {place: (row, found[1][place], found[2][place]) for place, row in found[0].items()}

    def _stopped_layers(self) -> set[int]:
        return {layer for run in self.runs for layer in stopped_layers(run)}


def stopped_layers(run: AuditRun) -> list[int]:
    """Exits of a run that were not asked everything, since their side of the limit was settled."""
    stopping = run.summary.get("stopping") or {"layers": []}
    return [entry["exit_layer"] for entry in stopping["layers"] if entry["decision"] is not None]


def _evidence(
    place: Place, metric: Metric, rows: tuple[Difference, Difference, Difference], *, samples: int
) -> Evidence:
    plain, against, favour = rows
    sign = 1 if metric.worse == "high" else -1
    bound = max(sign * against.high, sign * against.low)
    if against.gained is not None and against.lost is not None:
        worsened, bettered = (count / against.n for count in (against.gained, against.lost)[::sign])
        bound = max(bound, sign * against.difference + change_margin(worsened, bettered, samples))
    return Evidence(
        place=place,
        value=sign * plain.difference + 0.0,  # no -0
        bound=bound,
        other_end=min(sign * favour.low, sign * favour.high),
        n=plain.n,
        unscored=plain.unscored,
        samples=samples,
    )


def _cut(run: AuditRun, table: ScoreTable, judge: str | None, badness: float | None) -> _Cut:
    """The run with one judge, and with missing scores filled in: 1 is as bad as can be, 0 as good."""
    judges: list[dict[str, Any]] = [each for each in run.settings["judges"] if judge in (None, each["name"])]
    if badness is not None:
        filled = {key: _filled(scores, key[1], badness) for key, scores in table.scores.items()}
        table = ScoreTable(samples=table.samples, exit_layers=table.exit_layers, scores=filled)
    settings = {**run.settings, "judges": judges}
    return _Cut(path=run.path, settings=settings, origin=run.origin, summary=run.summary, table=table)


def _filled(scores: Scores, measure: str, badness: float) -> Scores:
    """A measure's scores without gaps; one of no direction, or on an open scale, stays as it is."""
    metric = next((each for each in METRICS if each.measure == measure and each.worse and each.bounds), None)
    if metric is None or metric.bounds is None:
        return scores
    worst = metric.bounds[::-1] if metric.worse == "high" else metric.bounds
    stand_in = worst[0] if badness == 1.0 else worst[1]
    return Scores(values=np.where(scores.unscored, stand_in, scores.values), unscored=np.zeros_like(scores.unscored))
