"""What changed between two runs and what it cost, in words: a comparison in, sentences and a table out.

Says of no difference more than its test does: lower, higher, or that none could be shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from exitsafe.comparison import Comparison, Difference
from exitsafe.report.facts import HIGHER, LOWER, NOT_SHOWN, change_table, verdict, worst_table
from exitsafe.report.names import shown
from exitsafe.report.numbers import TITLES, amount, change, count, is_rate, listed, number_list
from exitsafe.report.told import Compared, Passage, Told
from exitsafe.stats import BINS

COSTS = ("over_refusal", "benign_refusal", "vqa_accuracy")
"""What a safer model may lose: answers to what is harmless, and right answers."""


def what_changed(pair: Compared, *, is_only: bool) -> Passage:
    """Attack success on average, at the default exit and exit by exit.

    Args:
        pair: Two runs.
        is_only: Whether it is the page's only pair: then its numbers are shown at once.
    """
    heading, comparison = f"What changed from {shown(pair.before)} to {shown(pair.after)}", pair.comparison
    if comparison is None:
        return Passage(heading=heading, sentences=("Not known: the two runs share no request, or no exit layer.",))
    requests = f"the same {comparison.num_samples:,} request{'s' * (comparison.num_samples != 1)}"
    said = [f"Compared on {requests} at {_exits(len(comparison.exit_layers))}.{_left_out(comparison)}"]
    if comparison.settings_changed:
        said.append("The audits differ in more than the model (see Method): part of a change may come from that.")
    rows = comparison.rows("asr")
    if not rows:
        said.append("No judge scored attack success in both, so its change is not known.")
        return Passage(heading=heading, sentences=tuple(said))
    for place, where in _places(comparison):
        if (row := _at(rows, place)) is not None:
            said.append(f"Attack success {where} went {_difference(row)}.")
    said.append(_by_exit([row for row in rows if row.p_adjusted is not None]))
    chosen = [row for row in rows if row.place in (comparison.default_exit, *BINS, "average")]
    table = change_table(chosen, shown(pair.before), shown(pair.after), default_exit=comparison.default_exit)
    return Passage(heading=heading, sentences=tuple(said), table=table, is_open=is_only)


def what_it_cost(pair: Compared, runs: Sequence[Told]) -> Passage:
    """What a safer model may lose, on average, at the default exit and at the worst.

    Args:
        pair: Two runs.
        runs: The same two, whose worst exits are shown.
    """
    heading, comparison = f"What it cost from {shown(pair.before)} to {shown(pair.after)}", pair.comparison
    said = []
    for metric in COSTS:
        rows = () if comparison is None else comparison.rows(metric)
        changes = (
            []
            if comparison is None
            else [
                f"{where} {_difference(row)}"
                for place, where in _places(comparison)
                if (row := _at(rows, place)) is not None
            ]
        )
        if changes:
            said.append(f"{TITLES[metric]} went, {'; '.join(changes)}.")
        elif metric != "benign_refusal":  # a second look at over-refusal: its lack is no gap
            said.append(
                f"{TITLES[metric]} was not measured in both on the same requests: what it cost there is not known."
            )
    table = worst_table([(shown(told.label), told.run.summary) for told in runs], COSTS)
    return Passage(heading=heading, sentences=tuple(said), table=table)


def _difference(row: Difference) -> str:
    """A paired change, e.g. `from 90.0% to 2.0%: lower (change -88.0 points, ...)`."""
    unit = " points" if is_rate(row.metric) else ""
    band = f"{change(row.metric, row.low)} to {change(row.metric, row.high)}"
    return (
        f"from {amount(row.metric, row.before)} to {amount(row.metric, row.after)}: {verdict(row)} (change "
        f"{change(row.metric, row.difference)}{unit}, 95% interval {band}, {count(row.n, row.unscored)})"
    )


def _by_exit(rows: Sequence[Difference]) -> str:
    lower, higher, unclear = (
        [int(row.place) for row in rows if verdict(row) == said] for said in (LOWER, HIGHER, NOT_SHOWN)
    )
    parts = [
        f"{what} at {_exits(len(exits))} ({number_list(exits)})"
        for what, exits in (("lower", lower), ("higher", higher), ("not shown to differ", unclear))
        if exits
    ]
    return f"Exit by exit, with tests corrected for their number, it is {listed(parts)}."


def _places(comparison: Comparison) -> list[tuple[int | str, str]]:
    """Where a change is told: on average, and at the default exit."""
    num_exits = len(comparison.exit_layers)
    over = f"all {num_exits} exits" if num_exits == comparison.num_layers else f"the {_exits(num_exits)} compared"
    return [
        ("average", f"averaged over {over}, each third of the encoder counting alike,"),
        (comparison.default_exit, f"at the default exit, {comparison.default_exit},"),
    ]


def _at(rows: Sequence[Difference], place: int | str) -> Difference | None:
    return next((row for row in rows if row.place == place), None)


def _left_out(comparison: Comparison) -> str:
    left = {
        "in the first only": comparison.only_before,
        "in the second only": comparison.only_after,
        "asked otherwise": comparison.changed,
    }
    said = [f"{n:,} {why}" for why, n in left.items() if n]
    return f" Left out: {listed(said)}." if said else ""


def _exits(n: int) -> str:
    return f"{n} exit{'' if n == 1 else 's'}"
