"""The first screen: one sentence that says what was found, the numbers behind it, and what to know before reading them.

The sentence says of a difference no more than its test does: lower, higher, or not shown. It calls nothing safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitsafe.results.comparison import Comparison, Difference
from exitsafe.results.metrics import BY_NAME, as_noun, as_opening
from exitsafe.results.numbers import amount, change, count, estimate, interval, listed, number_list, percent
from exitsafe.results.run import AuditRun, title_in
from exitsafe.show.names import judge_names, without_folders
from exitsafe.show.result_tables import HIGHER, LOWER, NOT_SHOWN, LabelledRun, Summary, layer_estimates, verdict_of

Compared = Mapping[str, Comparison | None]
"""By label, every other run against the first; None where the two share no request or no exit."""


# ---- the sentence ----

_VERBS = {LOWER: "fell", HIGHER: "rose"}


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
    return sum(found["n"] for found in layer_estimates(run.summary, "asr").values())


def _nothing_known(runs: Sequence[LabelledRun]) -> str:
    kinds = [sample.kind for _, run in runs for sample in run.score_table().samples]
    if "harmful" not in kinds:
        return "Nothing is known about attack success: no harmful requests were sent."
    if not any("asr" in measures for _, run in runs for _, measures in run.judges):
        return "Nothing is known about attack success: no judge scored it."
    attacks = as_noun(title_in((run for _, run in runs), "asr"))
    return f"Nothing is known about {attacks}: not one answer to a harmful request could be scored."


def _of_one(run: AuditRun) -> str:
    summary, attacks = run.summary, run.title("asr")
    at_exits, default = layer_estimates(summary, "asr"), summary["default_exit"]
    worst = summary["worst"].get("asr")
    if len(at_exits) == 1:
        ((exit_layer, found),) = at_exits.items()
        return f"At exit {exit_layer}, the only one audited, {as_noun(attacks)} is {_asr(summary, exit_layer, found)}."
    if worst is None or worst["value"] is None:
        return f"There is too little evidence to name a worst exit: only {_num_scored(run):,} answers could be scored."
    at_worst = _asr(summary, worst["exit_layer"], worst)
    if default not in at_exits:
        return (
            f"{as_opening(attacks)} at the worst of the {len(at_exits)} exits audited, {worst['exit_layer']}, is "
            f"{at_worst}; the default exit, {default}, was not audited."
        )
    tests = [row["metrics"]["asr"] for row in summary["against_default"]["layers"] if "asr" in row["metrics"]]
    apart = [test["difference"] > 0 for test in tests if test["p_adjusted"] < 0.05]
    differs = [f"{word} at {apart.count(key)}" for key, word in ((True, HIGHER), (False, LOWER)) if key in apart]
    if not differs:
        return (
            f"{as_opening(attacks)} was not shown to differ between the default exit, {default}, and any other; at the "
            f"worst exit, {worst['exit_layer']}, it is {at_worst}."
        )
    return (
        f"{as_opening(attacks)} is {' and '.join(differs)} of {len(tests)} other exits than at the default exit, "
        f"{default}: {percent(worst['value'])} at the worst exit, {worst['exit_layer']}, against "
        f"{percent(at_exits[default]['value'])}."
    )


def _of_two(runs: Sequence[LabelledRun], after: str, comparison: Comparison | None) -> str:
    before, attacks = runs[0][0], as_noun(title_in((run for _, run in runs), "asr"))
    if comparison is None:
        return f"{before} and {after} cannot be compared: they share no request, or no exit."
    rows = comparison.rows("asr")
    average = next((row for row in rows if row.place == "average"), None)
    if average is None:
        return f"The change from {before} to {after} is unknown: {attacks} was not scored in both."
    exits = comparison.exit_layers
    where = "averaged over exits" if len(exits) > 1 else f"at exit {exits[0]}, the only one in both,"
    worst = dict(runs)[after].summary["worst"].get("asr")
    still = (
        ""
        if worst is None or worst["value"] is None
        else f", and is {percent(worst['value'])} at the worst exit, {worst['exit_layer']}"
    )
    return f"From {before} to {after}, {attacks} {where} {_went(rows, average)}{still}; {_cost(comparison)}."


def _went(rows: Sequence[Difference], average: Difference) -> str:
    """What attack success did, e.g. `fell from 40.0% to 2.0%, but rose at exit 3`."""
    values = f"from {amount('asr', average.before)} to {amount('asr', average.after)}"
    apart = {
        word: [int(row.place) for row in rows if row.p_adjusted is not None and verdict_of(row) == word]
        for word in (LOWER, HIGHER)
    }
    said = verdict_of(average)
    if said == NOT_SHOWN:
        band = f"{change('asr', average.low)} to {change('asr', average.high)} points"
        verb, others = "was not shown to change", [LOWER, HIGHER]
        values = f"({values}, 95% interval of the change {band}, n={average.n:,})"
    else:
        verb, others = _VERBS[said], [HIGHER if said == LOWER else LOWER]
    but = [f"{_VERBS[word]} at {exits_named(apart[word])}" for word in others if apart[word]]
    return f"{verb} {values}" + (f", but {' and '.join(but)}" if but else "")


def _cost(comparison: Comparison) -> str:
    by_said: dict[str, list[str]] = {}
    said = []
    for metric in ("over_refusal", "vqa_accuracy"):
        row = next((row for row in comparison.rows(metric) if row.place == "average"), None)
        title = as_noun(comparison.titles.get(metric, BY_NAME[metric].title))
        if row is not None and verdict_of(row) != NOT_SHOWN:
            said.append(
                f"{title} {_VERBS[verdict_of(row)]} from {amount(metric, row.before)} to {amount(metric, row.after)}"
            )
        else:
            by_said.setdefault("not measured in both" if row is None else "not shown to change", []).append(title)
    said += [f"{listed(titles)} {'was' if len(titles) == 1 else 'were'} {what}" for what, titles in by_said.items()]
    return listed(said)


def _of_many(runs: Sequence[LabelledRun], compared: Compared) -> str:
    labels: dict[str, list[str]] = {}
    for label, comparison in compared.items():
        rows = () if comparison is None else comparison.rows("asr")
        average = next((row for row in rows if row.place == "average"), None)
        labels.setdefault("not compared" if average is None else verdict_of(average), []).append(label)
    words = [
        f"{word} in {listed(labels[word])}" for word in (LOWER, HIGHER, NOT_SHOWN, "not compared") if word in labels
    ]
    attacks = as_opening(title_in((run for _, run in runs), "asr"))
    return f"{attacks} averaged over exits, against {runs[0][0]}, is {'; '.join(words)}."


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
    attacks, default = title_in(every, "asr"), every[0].summary["default_exit"]
    found = [
        KeyNumber(
            title=f"{attacks}, worst exit", values=tuple((label, *_worst_number(run.summary)) for label, run in runs)
        ),
        KeyNumber(
            title=f"{attacks}, default exit ({default})",
            values=tuple((label, *_default_number(run.summary)) for label, run in runs),
        ),
    ]
    for metric in ("over_refusal", "vqa_accuracy"):
        values = tuple((label, *_mean_number(run.summary, metric)) for label, run in runs)
        found.append(KeyNumber(title=f"{title_in(every, metric)}, mean over exits", values=values))
    return found


def _worst_number(summary: Summary) -> tuple[str, str]:
    worst, at_exits = summary["worst"].get("asr"), layer_estimates(summary, "asr")
    if worst is None and len(at_exits) == 1:
        ((exit_layer, found),) = at_exits.items()
        return _number("asr", found, f"only exit {exit_layer}", level=interval_level(summary, exit_layer))
    if worst is None:
        return "unknown", "too few scored answers" if at_exits else "not measured"
    level = interval_level(summary, worst["exit_layer"])
    return _number("asr", worst, f"exit {worst['exit_layer']}", level=level)


def _default_number(summary: Summary) -> tuple[str, str]:
    at_exits, default = layer_estimates(summary, "asr"), summary["default_exit"]
    if default not in at_exits:
        return "unknown", "not audited" if at_exits else "not measured"
    return _number("asr", at_exits[default], level=interval_level(summary, default))


def _mean_number(summary: Summary, metric: str) -> tuple[str, str]:
    found = summary["bins"].get("average", {}).get("metrics", {}).get(metric)
    if found is None:
        return "unknown", "not measured"
    num_exits = len(layer_estimates(summary, metric))
    return _number(metric, found, *([] if num_exits > 1 else ["one exit only"]))


def _number(metric: str, found: Mapping[str, Any], *notes: str, level: str = "95%") -> tuple[str, str]:
    counts = count(found["n"], found["unscored"])
    if found["value"] is None:
        return "unknown", ", ".join([*notes, counts])
    band = f"{level} interval {interval(metric, found['low'], found['high'])}"
    return amount(metric, found["value"]), ", ".join([*notes, band, counts])


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


# ---- words ----


def interval_level(summary: Summary, exit_layer: int) -> str:
    """Of attack success: 95%, or, if the exit stopped early, the level that holds whenever it stops."""
    stopping = summary.get("stopping", {"layers": []})
    has_stopped = any(row["exit_layer"] == exit_layer and row["decision"] is not None for row in stopping["layers"])
    return f"{100 * (1 - stopping['error']):.3g}%" if has_stopped else "95%"


def exits_named(exit_layers: Sequence[int]) -> str:
    """For a sentence, e.g. `exits 1-3, 7`."""
    return f"exit{'' if len(exit_layers) == 1 else 's'} {number_list(list(exit_layers))}"


def _asr(summary: Summary, exit_layer: int, found: Mapping[str, Any]) -> str:
    return estimate("asr", found, level=interval_level(summary, exit_layer))
