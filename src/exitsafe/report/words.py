"""The page's summary in plain words: summaries and comparisons in, sentences out. Knows no markup and reads no file.

Every sentence repeats numbers with what they rest on, and says of no difference more than its test does: lower, higher,
or that none could be shown. Nothing here calls a model safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from exitsafe.comparison import Comparison, Difference
from exitsafe.records import Kind
from exitsafe.report.facts import (
    HIGHER,
    LOWER,
    NOT_SHOWN,
    Summary,
    Table,
    change_table,
    layer_estimates,
    overview_table,
    verdict,
    worst_table,
)
from exitsafe.report.names import shown, without_folder
from exitsafe.report.numbers import TITLES, amount, change, count, estimate, is_rate, listed, number_list
from exitsafe.runs import AuditRun
from exitsafe.runs.metrics import METRICS, judge_of
from exitsafe.stats import BINS

COSTS = ("over_refusal", "benign_refusal", "vqa_accuracy")
"""What a safer model may lose: answers to what is harmless, and right answers."""
_KINDS: Mapping[Kind, str] = {
    "harmful": "{} harmful (should be refused)",
    "borderline": "{} borderline (look harmful, should be answered)",
    "benign": "{} benign (should be answered)",
    "vqa": "{} picture questions with known answers",
}


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A heading, what is said under it, and the numbers that it rests on; `is_open` if they are shown at once."""

    heading: str
    sentences: tuple[str, ...]
    table: Table | None = None
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Told:
    """A run as the words need it.

    Args:
        label: Its name on the page.
        run: The run; only settings and summary are read.
        kinds: How many samples of each kind it asked.
        finished: The day its summary was written, e.g. `22 November 2026`; None if unknown.
    """

    label: str
    run: AuditRun
    kinds: Mapping[Kind, int]
    finished: str | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The first run against another; no comparison where they share no sample or no exit layer."""

    before: str
    after: str
    comparison: Comparison | None


def summary_in_words(runs: Sequence[Told], compared: Sequence[Compared]) -> list[Passage]:
    """What was tested, the worst exit, what changed and what it cost, in that order.

    Args:
        runs: The run to start from first.
        compared: It against each other run; none for one run.
    """
    found = [
        Passage(heading="What was tested", sentences=tuple(_tested(runs))),
        Passage(
            heading="The worst exit",
            sentences=tuple(_worst(runs)),
            table=worst_table([(shown(told.label), told.run.summary) for told in runs], ["asr"]),
        ),
    ]
    if len(runs) > 2:
        table = overview_table([(shown(told.label), told.run.summary) for told in runs])
        found.append(Passage(heading="All runs side by side", sentences=(), table=table, is_open=True))
    for pair in compared:
        after = next(told for told in runs if told.label == pair.after)
        found += [_changed(pair, is_only=len(compared) == 1), _cost(pair, [runs[0], after])]
    if not compared:
        found.append(_usefulness(runs[0]))
    if stopped := tuple(sentence for told in runs for sentence in _stopped(told)):
        found.append(Passage(heading="Stopped early", sentences=stopped))
    return found


def _tested(runs: Sequence[Told]) -> Iterator[str]:
    first = runs[0]
    summary = first.run.summary
    yield (
        f"{model_name(first.run)} is a vision-language model ({shown(str(summary['family']))}) whose image encoder has "
        f"{summary['num_layers']} blocks. An exit layer is the number of blocks that run before the language model "
        f"reads the picture; the untouched model uses exit {summary['default_exit']}, the default."
    )
    # said once where all runs agree, else run by run
    for describe in (_asked, _judges):
        said = {describe(told) for told in runs}
        for told in runs[:1] if len(said) == 1 else runs:
            prefix = "" if len(said) == 1 else f"{shown(told.label)}: "
            yield prefix + describe(told)
    for told in runs:
        adapter = told.run.settings.get("model", {}).get("adapter")
        what = "without an adapter" if adapter is None else f"with the adapter {adapter[:12]}"
        name = "" if model_name(told.run) == model_name(first.run) else f"{model_name(told.run)} "
        day = "" if told.finished is None else f", results of {told.finished}"
        yield f"{shown(told.label)}: {name}{what}{day}."


def _asked(told: Told) -> str:
    exits = told.run.exit_layers
    num_layers = told.run.summary["num_layers"]
    where = (
        f"each of its {num_layers} exits"
        if len(exits) == num_layers
        else f"exit{'s' * (len(exits) > 1)} {number_list(list(exits))}"
    )
    kinds = [text.format(f"{told.kinds[kind]:,}") for kind, text in _KINDS.items() if told.kinds.get(kind)]
    sources = told.run.settings.get("data", {}).get("sources", {})
    suites = [f"{shown(without_folder(name)) or 'unnamed'} ({n:,})" for name, n in sources.items()]
    total = sum(told.kinds.values())
    said = f"It was asked {total:,} requests at {where}: {listed(kinds)}."
    return said + (f" Suites: {listed(suites)}." if suites else "")


def _judges(told: Told) -> str:
    by_judge: dict[str, list[str]] = {}
    for metric in METRICS:
        judge = judge_of(metric, told.run.judges)
        if judge is not None and not metric.is_own and layer_estimates(told.run.summary, metric.name):
            by_judge.setdefault(judge, []).append(TITLES[metric.name].lower().replace("vqa", "VQA"))
    if not by_judge:
        return "No judge scored its answers."
    said = "; ".join(f"{listed(metrics)} by {shown(judge)}" for judge, metrics in by_judge.items())
    others = [shown(name) for name, _ in told.run.judges if name not in by_judge]
    return f"Judged were {said}." + (f" A second opinion came from {listed(others)}." if others else "")


def _worst(runs: Sequence[Told]) -> Iterator[str]:
    for told in runs:
        yield _worst_of(shown(told.label), told.run.summary)
    chosen = [(told, told.run.summary["worst"].get("asr")) for told in runs]
    if not any(worst for _, worst in chosen):
        return
    yield (
        "A worst exit is chosen on one half of the harmful requests and measured on the other, so that its rate is not "
        "picked for its luck."
    )
    for told, worst in chosen:
        other = None if worst is None else worst["swapped"]
        if other is not None and other["exit_layer"] != worst["exit_layer"]:
            yield (
                f"{shown(told.label)}: with the halves swapped, exit {other['exit_layer']} is chosen, with "
                f"{estimate('asr', other)}. Which exit is worst is not certain."
            )


def _worst_of(label: str, summary: Summary) -> str:
    at_exits, default = layer_estimates(summary, "asr"), summary["default_exit"]
    worst = summary["worst"].get("asr")
    if not at_exits:
        return f"{label}: attack success was not measured, so no exit can be called worst."
    if len(at_exits) == 1:
        exit_layer, found = next(iter(at_exits.items()))
        return f"{label}: only exit {exit_layer} was audited; attack success there is {estimate('asr', found)}."
    if worst is None:
        said = f"{label}: too few answers were scored to choose a worst exit on one half and measure it on the other"
    else:
        said = f"{label}: at the worst exit, {worst['exit_layer']}, attack success is {estimate('asr', worst)}"
    if default in at_exits:
        return f"{said}; at the default exit, {default}, it is {estimate('asr', at_exits[default])}."
    return f"{said}; the default exit, {default}, was not audited."


def _changed(pair: Compared, *, is_only: bool) -> Passage:
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


def _cost(pair: Compared, runs: Sequence[Told]) -> Passage:
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


def _usefulness(told: Told) -> Passage:
    summary, said = told.run.summary, []
    for metric in COSTS:
        found, default = layer_estimates(summary, metric), summary["default_exit"]
        if default in found:
            said.append(f"{TITLES[metric]} at the default exit, {default}, is {estimate(metric, found[default])}.")
        elif not found and metric != "benign_refusal":
            said.append(f"{TITLES[metric]} was not measured.")
    table = worst_table([(shown(told.label), summary)], COSTS)
    return Passage(heading="Over-refusal and usefulness", sentences=tuple(said), table=table)


def _stopped(told: Told) -> Iterator[str]:
    stopping = told.run.summary.get("stopping")
    if stopping is None:
        return
    by_decision: dict[str | None, list[int]] = {}
    for row in stopping["layers"]:
        by_decision.setdefault(row["decision"], []).append(row["exit_layer"])
    limit = f"{stopping['max_asr']:.1%}"
    words = {"below": f"at most {limit}", "above": f"above {limit}", None: "still open at the end"}
    parts = [f"exits {number_list(by_decision[key])} {text}" for key, text in words.items() if key in by_decision]
    yield (
        f"{shown(told.label)}: an exit was asked no further once it was settled whether its attack success is at most "
        f"{limit} (error level {stopping['error']:.0%}, by {shown(stopping['judge'])}): {'; '.join(parts)}."
    )
    yield (
        "Exits that stopped rest on fewer answers and have the interval that holds at every look; means over exits and "
        "tests that include them are a guide only."
    )


def model_name(run: AuditRun) -> str:
    """As it may be shown."""
    return shown(without_folder(str(run.summary["model"])))


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


def _exits(n: int) -> str:
    return f"{n} exit{'' if n == 1 else 's'}"


def _left_out(comparison: Comparison) -> str:
    left = {
        "in the first only": comparison.only_before,
        "in the second only": comparison.only_after,
        "asked otherwise": comparison.changed,
    }
    said = [f"{n:,} {why}" for why, n in left.items() if n]
    return f" Left out: {listed(said)}." if said else ""
