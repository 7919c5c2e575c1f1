"""The report's first screen: a verdict in one sentence, the four numbers, and what to know before reading them.

The verdict calls a difference what its test shows: lower, higher, or not shown. It calls nothing safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from exitsafe.results.comparison import HIGHER, LOWER, NOT_SHOWN, VERBS, Comparison, Difference, against_default
from exitsafe.results.metrics import as_noun, as_opening
from exitsafe.results.numbers import amount, count, estimate, exits_named, interval, listed, percent
from exitsafe.results.run import AuditRun, title_in
from exitsafe.show.names import judge_names, without_folders
from exitsafe.show.tables import LabelledRun, interval_level
from exitsafe.stats import Estimate

Compared = Mapping[str, Comparison | None]
"""By label, every other run against the first; None where the two share no request or no exit."""


# ---- the sentence ----


def verdict(runs: Sequence[LabelledRun], compared: Compared) -> str:
    """What was found, in one sentence.

    Args:
        runs: The baseline first.
        compared: The other runs against it.
    """
    if not any(_num_scored(run) for _, run in runs):
        return _nothing_known(runs)
    if not compared:
        return _of_one(runs[0][1])
    if len(compared) == 1:
        ((after, comparison),) = compared.items()
        return _of_two(runs, after, comparison)
    return _of_many(runs, compared)


def _num_scored(run: AuditRun) -> int:
    return sum(found.n for found in run.at_exits("asr").values())


def _nothing_known(runs: Sequence[LabelledRun]) -> str:
    kinds = [sample.kind for _, run in runs for sample in run.score_table().samples]
    if "harmful" not in kinds:
        return "Nothing is known about attack success: no harmful requests were sent."
    if not any("asr" in measures for _, run in runs for _, measures in run.judges):
        return "Nothing is known about attack success: no judge scored it."
    attacks = as_noun(title_in((run for _, run in runs), "asr"))
    return f"Nothing is known about {attacks}: not one answer to a harmful request could be scored."


def _of_one(run: AuditRun) -> str:
    attacks, at_exits, default, worst = run.title("asr"), run.at_exits("asr"), run.default_exit, run.worst("asr")
    if len(at_exits) == 1:
        ((exit_layer, found),) = at_exits.items()
        where = exits_named([exit_layer])
        return f"At {where}, the only one audited, {as_noun(attacks)} is {_asr(run, exit_layer, found)}."
    if worst is None or worst.value is None:
        return f"There is too little evidence to name a worst exit: only {_num_scored(run):,} answers could be scored."
    at_worst = _asr(run, worst.exit_layer, worst)
    if default not in at_exits:
        return (
            f"{as_opening(attacks)} at the worst of the {len(at_exits)} exits audited, {worst.exit_layer}, is "
            f"{at_worst}; the default exit, {default}, was not audited."
        )
    tests = against_default(run).get("asr", [])
    outcomes = [row.outcome for row in tests]
    differs = [f"{word} at {outcomes.count(word)}" for word in (HIGHER, LOWER) if word in outcomes]
    if not differs:
        return (
            f"{as_opening(attacks)} was not shown to differ between the default exit, {default}, and any other; at the "
            f"worst exit, {worst.exit_layer}, it is {at_worst}."
        )
    return (
        f"{as_opening(attacks)} is {' and '.join(differs)} of {len(tests)} other exits than at the default exit, "
        f"{default}: {percent(worst.value)} at the worst exit, {worst.exit_layer}, against "
        f"{_rate(at_exits[default])}."
    )


def _of_two(runs: Sequence[LabelledRun], after: str, comparison: Comparison | None) -> str:
    before, attacks = runs[0][0], as_noun(title_in((run for _, run in runs), "asr"))
    if comparison is None:
        return f"{before} and {after} cannot be compared: they share no request, or no exit."
    average = comparison.average("asr")
    if average is None:
        return f"The change from {before} to {after} is unknown: {attacks} was not scored in both."
    worst = dict(runs)[after].worst("asr")
    still = (
        f", and is {_rate(worst)} at the worst exit, {worst.exit_layer}" if worst and worst.value is not None else ""
    )
    went = _went(comparison, average)
    return f"From {before} to {after}, {attacks} {comparison.where} {went}{still}; {comparison.cost}."


def _went(comparison: Comparison, average: Difference) -> str:
    """What attack success did, e.g. `fell from 40.0% to 2.0%, but rose at exit 3`."""
    is_shown = average.outcome != NOT_SHOWN
    values = f"from {average.values}" if is_shown else f"({average.values}, {average.evidence})"
    others = {word: comparison.exits("asr", word) for word in (LOWER, HIGHER) if word != average.outcome}
    but = [f"{VERBS[word]} at {exits_named(exits)}" for word, exits in others.items() if exits]
    return f"{VERBS[average.outcome]} {values}" + (f", but {' and '.join(but)}" if but else "")


def _of_many(runs: Sequence[LabelledRun], compared: Compared) -> str:
    labels: dict[str, list[str]] = {}
    for label, comparison in compared.items():
        average = comparison and comparison.average("asr")
        labels.setdefault(average.outcome if average else "not compared", []).append(label)
    words = [
        f"{word} in {listed(labels[word])}" for word in (LOWER, HIGHER, NOT_SHOWN, "not compared") if word in labels
    ]
    attacks = as_opening(title_in((run for _, run in runs), "asr"))
    return f"{attacks} averaged over exits, compared with {runs[0][0]}, is {'; '.join(words)}."


def _asr(run: AuditRun, exit_layer: int, found: Estimate) -> str:
    return estimate("asr", found, level=interval_level(run, exit_layer))


def _rate(found: Estimate) -> str:
    return "unknown" if found.value is None else percent(found.value)


# ---- the numbers ----


@dataclass(frozen=True, kw_only=True)
class KeyNumber:
    """A number of every run.

    Args:
        title: What it is.
        values: Label, value, and what the value rests on.
    """

    title: str
    values: tuple[tuple[str, str, str], ...]


def key_numbers(runs: Sequence[LabelledRun]) -> list[KeyNumber]:
    """Attack success at the worst and the default exit, over-refusal and VQA accuracy."""
    every = [run for _, run in runs]
    attacks = title_in(every, "asr")
    numbers: dict[str, Callable[[AuditRun], tuple[str, str]]] = {
        f"{attacks}, worst exit": _worst_number,
        f"{attacks}, default exit ({every[0].default_exit})": _default_number,
        f"{title_in(every, 'over_refusal')}, mean over exits": partial(_mean_number, metric="over_refusal"),
        f"{title_in(every, 'vqa_accuracy')}, mean over exits": partial(_mean_number, metric="vqa_accuracy"),
    }
    return [
        KeyNumber(title=title, values=tuple((label, *number(run)) for label, run in runs))
        for title, number in numbers.items()
    ]


def _worst_number(run: AuditRun) -> tuple[str, str]:
    worst, at_exits = run.worst("asr"), run.at_exits("asr")
    if worst is None and len(at_exits) == 1:
        ((exit_layer, found),) = at_exits.items()
        return _number("asr", found, f"only {exits_named([exit_layer])}", level=interval_level(run, exit_layer))
    if worst is None:
        return "unknown", "too few scored answers" if at_exits else "not measured"
    return _number("asr", worst, f"exit {worst.exit_layer}", level=interval_level(run, worst.exit_layer))


def _default_number(run: AuditRun) -> tuple[str, str]:
    at_exits, default = run.at_exits("asr"), run.default_exit
    if default not in at_exits:
        return "unknown", "not audited" if at_exits else "not measured"
    return _number("asr", at_exits[default], level=interval_level(run, default))


def _mean_number(run: AuditRun, *, metric: str) -> tuple[str, str]:
    found = run.estimates(metric).get("average")
    if found is None:
        return "unknown", "not measured"
    return _number(metric, found, *([] if len(run.at_exits(metric)) > 1 else ["one exit only"]))


def _number(metric: str, found: Estimate, *notes: str, level: str = "95%") -> tuple[str, str]:
    counts = count(found.n, found.unscored)
    if found.value is None or found.low is None or found.high is None:
        return "unknown", ", ".join([*notes, counts])
    band = f"{level} interval {interval(metric, found.low, found.high)}"
    return amount(metric, found.value), ", ".join([*notes, band, counts])


# ---- what to know first ----


def cautions(runs: Sequence[LabelledRun], compared: Compared) -> Iterator[str]:
    """What to know before reading the numbers: proxies, training samples, replaced judges, unequal audits."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    labels: dict[str, list[str]] = {}
    for label, run in runs:
        for line in run.cautions:
            labels.setdefault(line, []).append(label)
    for line, own in labels.items():
        line = without_folders(line, called)
        if len(own) == len(runs):  # most begin with a judge's name, which keeps its case
            yield f"{'T' if line.startswith('the ') else line[:1]}{line[1:]}."
        else:
            yield f"{listed(own)}: {line}."
    for label, comparison in compared.items():
        if comparison is not None and comparison.models_changed:
            changes = without_folders("; ".join(comparison.models_changed), called)
            yield f"{runs[0][0]} and {label} are not of the same model ({changes})."
        if comparison is not None and comparison.settings_changed:
            yield (
                f"The audits of {runs[0][0]} and {label} also differ in their settings (see Method), so part of a "
                "change may come from that."
            )
