"""How much worse a run is than another, paired by sample: two runs in, evidence out.

The numbers are those of `exitsafe compare`, with two safeguards: a pair without a score counts as the worst possible
change (as good as possible before, as bad as possible after), and the bound on a rate's change is the wider of the
bootstrap's and a score interval's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from exitsafe.gate.evidence import STOPPED, Evidence, Gap, Place
from exitsafe.results.comparison import Difference, Differences, Pairing, shared_judges
from exitsafe.results.metrics import Metric, judge_of
from exitsafe.results.run import AuditRun
from exitsafe.stats.bounds import change_margin

_NOT_IN_BOTH = Gap(reason="this exit is not in both runs", fix="audit both at the same exits")
_UNSCORED = Gap(reason="no pair could be scored", fix="exitsafe judge RUN --retry-unscored, or another judge")
_NO_PAIRS = Gap(reason="there are no pairs to compare", fix="audit both with the same suites")
_OTHER_EXITS = Gap(reason="bins are compared over all exits of both runs", fix="leave out --layers, or --scope layers")


class Regressions:
    """Two runs, paired once for all rules.

    Args:
        before: The run to compare with.
        after: The run that is checked.

    Raises:
        RunError: If the runs share no sample or no exit.
    """

    def __init__(self, before: AuditRun, after: AuditRun) -> None:
        self.before, self.after = before, after
        num_layers = max(before.num_layers, after.num_layers)
        self.pairing = Pairing.of(before.score_table(), after.score_table(), num_layers=num_layers)
        self._stopped = {layer for run in (before, after) for layer in stopped_layers(run)}

    def judge_of(self, metric: Metric, judge: str | None) -> str | None:
        """This judge, or the first, if it measured the metric in both runs."""
        return judge_of(metric, [each for each in shared_judges(self.before, self.after) if judge in (None, each[0])])

    def evidence(self, metric: Metric, judge: str | None, *, is_by_bin: bool, layers: Sequence[int]) -> list[Evidence]:
        """How much worse each place became, with the sign of a metric that must be low."""
        who = self.judge_of(metric, judge)
        plain = None if who is None else self.pairing.differences(metric, who)
        if who is None or plain is None or not (plain.layers or plain.unscored):
            reason = f"{judge} did not measure" if judge else "no judge measured"
            missing = Gap(
                reason=f"{reason} {metric.name} in both runs",
                fix="judge both runs alike: exitsafe judge RUN --judge NAME",
            )
            return [Evidence(place=Place(), missing=missing)]
        stopped = self._stopped if "harmful" in metric.kinds else set()
        if is_by_bin:
            return list(self._by_bin(metric, who, plain, layers, has_stopped=bool(stopped & set(layers))))
        return list(self._by_layer(metric, who, plain, layers, stopped=stopped))

    def _by_layer(
        self, metric: Metric, judge: str, plain: Differences, layers: Sequence[int], *, stopped: set[int]
    ) -> Iterator[Evidence]:
        rows = self._three(metric, judge, plain)
        lost = {row.exit_layer: row.pairs for row in plain.unscored}
        for layer in layers:
            place = Place(exit_layer=layer)
            if layer not in self.pairing.before.exit_layers:
                yield Evidence(place=place, missing=_NOT_IN_BOTH)
            elif layer in stopped:
                yield Evidence(place=place, missing=STOPPED)
            elif layer in rows:
                yield _evidence(place, metric, rows[layer], samples=rows[layer][0].n + rows[layer][0].unscored)
            elif layer in lost:
                yield Evidence(place=place, unscored=lost[layer], missing=_UNSCORED)
            else:
                yield Evidence(place=place, missing=_NO_PAIRS)

    def _by_bin(
        self, metric: Metric, judge: str, plain: Differences, layers: Sequence[int], *, has_stopped: bool
    ) -> Iterator[Evidence]:
        if set(layers) != set(self.pairing.before.exit_layers):
            yield Evidence(place=Place(), missing=_OTHER_EXITS)
            return
        bins = {place: rows for place, rows in self._three(metric, judge, plain).items() if isinstance(place, str)}
        if not bins:
            yield Evidence(place=Place(), missing=_UNSCORED)
        pairs = max((row.n + row.unscored for row in plain.layers), default=0)
        for name, rows in bins.items():
            found = _evidence(Place(bin=name), metric, rows, samples=pairs)
            yield replace(found, missing=STOPPED) if has_stopped else found

    def _three(
        self, metric: Metric, judge: str, plain: Differences
    ) -> dict[int | str, tuple[Difference, Difference, Difference]]:
        """Each place's row: over scored pairs, and with the others counted against the model and in its favour."""
        against = favour = plain
        if metric.bounds is not None and any(row.unscored for row in (*plain.layers, *plain.bins)):
            best, worst = metric.bounds if metric.direction == "lower" else metric.bounds[::-1]
            against = self.pairing.differences(metric, judge, unscored_as=(best, worst))
            favour = self.pairing.differences(metric, judge, unscored_as=(worst, best))
        rows, worse, better = ({row.place: row for row in (*d.layers, *d.bins)} for d in (plain, against, favour))
        return {place: (row, worse[place], better[place]) for place, row in rows.items()}


def stopped_layers(run: AuditRun) -> list[int]:
    """Exits of a run that stopped early, because it was settled on which side of the limit they are."""
    stopping = run.summary.get("stopping") or {"layers": []}
    return [entry["exit_layer"] for entry in stopping["layers"] if entry["decision"] is not None]


def _evidence(
    place: Place, metric: Metric, rows: tuple[Difference, Difference, Difference], *, samples: int
) -> Evidence:
    plain, against, favour = rows
    sign = 1 if metric.direction == "lower" else -1
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
