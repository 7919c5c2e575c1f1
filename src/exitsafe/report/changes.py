"""What changed between runs and what it cost, in words: comparisons in, sentences and tables out.

Says of no difference more than its test does: lower, higher, or that none could be shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exitsafe.comparison import Comparison, Difference
from exitsafe.report.facts import (
    HIGHER,
    LOWER,
    NOT_SHOWN,
    change_table,
    layer_estimates,
    verdict,
    worst_table,
)
from exitsafe.report.names import judge_names, shown, without_folders
from exitsafe.report.told import Compared, Passage, Told, interval_level
from exitsafe.runs.finished import title_in
from exitsafe.runs.metrics import as_opening
from exitsafe.runs.numbers import amount, change, count, interval, is_rate, listed, number_list

COSTS = ("over_refusal", "benign_refusal", "vqa_accuracy")
"""What a safer model may lose: answers to what is harmless, and right answers."""


_IN_SHORT = {"over_refusal": "over-refusal", "vqa_accuracy": "VQA accuracy"}


def in_short(runs: Sequence[Told], compared: Sequence[Compared]) -> Iterator[str]:
    """What to pass on where one reads no further: attack success at its worst and by default, and what it cost.

    Args:
        runs: The run to start from first.
        compared: It against each other run; none for one run.
    """
    comparison = compared[0].comparison if len(compared) == 1 else None
    default = runs[0].run.summary["default_exit"]
    places = {
        "at its highest": [_highest(told, "asr") for told in runs],
        f"at the default exit, {default}": _at_default(runs, "asr"),
    }
    said = [f"{place}, {text}" for place, found in places.items() if (text := _values(runs, "asr", found))]
    row = None if comparison is None else _at(comparison.rows("asr"), default)
    tested = "" if comparison is None else " (not compared)" if row is None else f" ({verdict(row)})"
    if comparison is not None and comparison.models_changed:
        yield f"The two runs are not of the same model ({'; '.join(_public(comparison.models_changed, runs))})."
    if said:
        yield f"{_what_was_counted(runs)}: {'; '.join(said)}{tested}."
    else:
        yield "How many harmful requests got a harmful answer is not known."
    if comparison is None:
        at_default = {metric: _values(runs, metric, _at_default(runs, metric)) for metric in _IN_SHORT}
        values = [f"{what} {at_default[metric] or 'unknown'}" for metric, what in _IN_SHORT.items()]
        yield f"What should be answered, at the default exit, {default}: {'; '.join(values)}."
    else:
        rows = {metric: _at(comparison.rows(metric), "average") for metric in _IN_SHORT}
        values = [f"{what} {_went(rows[metric])}" for metric, what in _IN_SHORT.items()]
        yield f"What it cost, {_places(comparison)[0][1]} {'; '.join(values)}."
        if comparison.settings_changed:
            yield "The audits differ in more than the model."
    if any(pair.comparison is None for pair in compared):
        yield "Runs that share no request or no exit are not compared."
    levels = {interval_level(told.run.summary, exit_layer) for told in runs for exit_layer in told.run.exit_layers}
    yield f"In brackets: {' or '.join(sorted(levels))} intervals."


def _what_was_counted(runs: Sequence[Told]) -> str:
    """What the rate of attack success counts, according to the judges that report it."""
    found = dict.fromkeys(
        "harmful requests that got a harmful answer, as an automatic judge sees it"
        if (counted := told.run.proxy_of("asr").get("asr")) is None
        else f"harmful requests by a proxy ({counted}; what the answers say is not judged)"
        for told in runs
        if layer_estimates(told.run.summary, "asr")
    )
    text = " / ".join(found)
    return text[:1].upper() + text[1:]


def _public(lines: Sequence[str], runs: Sequence[Told]) -> list[str]:
    """Lines of a comparison without this machine's folders."""
    called = judge_names(name for told in runs for name, _ in told.run.judges)
    return [without_folders(line, called) for line in lines]


def what_changed(pair: Compared, runs: Sequence[Told]) -> Passage:
    """How the models differ; attack success on average, at the default exit and exit by exit.

    Args:
        pair: Two runs.
        runs: The same two.
    """
    heading, comparison = f"What changed from {shown(pair.before)} to {shown(pair.after)}", pair.comparison
    if comparison is None:
        return Passage(heading=heading, sentences=("Not known: the two runs share no request, or no exit layer.",))
    said = [
        f"{line[:1].upper()}{line[1:]}."
        for line in _public([*comparison.models_changed, *comparison.repairs_changed], runs)
    ]
    requests = f"the same {comparison.num_samples:,} request{'s' * (comparison.num_samples != 1)}"
    said.append(f"Compared on {requests} at {_exits(len(comparison.exit_layers))}.{_left_out(comparison)}")
    if comparison.settings_changed:
        said.append("The audits differ in more than the model (see Method): part of a change may come from that.")
    rows = comparison.rows("asr")
    if not rows:
        said.append("No judge scored attack success in both, so its change is not known.")
        return Passage(heading=heading, sentences=tuple(said))
    for place, where in _places(comparison):
        if (row := _at(rows, place)) is not None:
            said.append(f"{as_opening(comparison.titles['asr'])} {where} went {_difference(row)}.")
    said.append(_by_exit([row for row in rows if row.p_adjusted is not None]))
    table = change_table(comparison, "asr", shown(pair.before), shown(pair.after))
    return Passage(heading=heading, sentences=tuple(said), table=table)


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
        if changes and comparison is not None:
            said.append(f"{comparison.titles[metric]} went, {'; '.join(changes)}.")
        elif metric != "benign_refusal":  # a second look at over-refusal: its lack is no gap
            title = title_in([told.run for told in runs], metric)
            said.append(f"{title} was not measured in both runs on the same requests: any cost there is unknown.")
    table = worst_table([(shown(told.label), told.run) for told in runs], COSTS)
    return Passage(heading=heading, sentences=tuple(said), table=table)


def _went(row: Difference | None) -> str:
    if row is None:
        return "unknown"
    return f"from {amount(row.metric, row.before)} to {amount(row.metric, row.after)} ({verdict(row)})"


def _at_default(runs: Sequence[Told], metric: str) -> list[Mapping[str, Any] | None]:
    return [layer_estimates(told.run.summary, metric).get(told.run.summary["default_exit"]) for told in runs]


def _highest(told: Told, metric: str) -> Mapping[str, Any] | None:
    """The exit on top of the chart, with its number; that its rate is picked is said below, of the worst exit."""
    known = {e: found for e, found in layer_estimates(told.run.summary, metric).items() if found["value"] is not None}
    if not known:
        return None
    top = max(known, key=lambda exit_layer: known[exit_layer]["value"])
    return {**known[top], "exit_layer": top}


def _values(runs: Sequence[Told], metric: str, found: Sequence[Mapping[str, Any] | None]) -> str:
    """Each run's value with its interval, e.g. `before 90.0% (80.0 to 100.0%), after unknown`; "" if none is known."""
    said = []
    for told, value in zip(runs, found, strict=True):
        number = "unknown"
        if value is not None and value["value"] is not None:
            number = f"{amount(metric, value['value'])} ({interval(metric, value['low'], value['high'])})"
            number += f" at exit {value['exit_layer']}" if "exit_layer" in value else ""
        said.append(number if len(runs) == 1 else f"{shown(told.label)} {number}")
    return "" if all(text.endswith("unknown") for text in said) else listed(said)


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
        "that ask something else": comparison.changed,
    }
    said = [f"{n:,} {why}" for why, n in left.items() if n]
    return f" Left out: {listed(said)}." if said else ""


def _exits(n: int) -> str:
    return f"{n} exit{'' if n == 1 else 's'}"
