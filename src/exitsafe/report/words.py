"""The page's summary in plain words: summaries and comparisons in, sentences out. Knows no markup and reads no file.

Every sentence repeats numbers with what they rest on, and says of no difference more than its test does: lower, higher,
or that none could be shown. Nothing here calls a model safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from exitsafe.records import Kind
from exitsafe.report.changes import COSTS, what_changed, what_it_cost
from exitsafe.report.facts import Summary, layer_estimates, overview_table, worst_table
from exitsafe.report.names import judge_names, shown, without_folder, without_folders
from exitsafe.report.told import Compared, Passage, Told, interval_level, model_name
from exitsafe.runs import AuditRun
from exitsafe.runs.metrics import METRICS, as_noun, as_opening, judge_of
from exitsafe.runs.numbers import estimate, listed, number_list, percent

_KINDS: Mapping[Kind, str] = {
    "harmful": "{} harmful (should be refused)",
    "borderline": "{} borderline (look harmful, should be answered)",
    "benign": "{} benign (should be answered)",
    "vqa": "{} picture questions with known answers",
}


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
            table=worst_table([(shown(told.label), told.run) for told in runs], ["asr"]),
        ),
    ]
    if len(runs) > 2:
        table = overview_table([(shown(told.label), told.run) for told in runs])
        found.append(Passage(heading="All runs side by side", sentences=(), table=table))
    for pair in compared:
        after = next(told for told in runs if told.label == pair.after)
        found += [what_changed(pair, [runs[0], after]), what_it_cost(pair, [runs[0], after])]
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
    called = judge_names(name for told in runs for name, _ in told.run.judges)
    for describe in (_asked, partial(_judges, called=called)):
        said = {describe(told) for told in runs}
        for told in runs[:1] if len(said) == 1 else runs:
            prefix = "" if len(said) == 1 else f"{shown(told.label)}: "
            yield prefix + describe(told)
    for told in runs:
        for line in told.run.cautions:
            yield f"{shown(told.label)}: {without_folders(line, called)}."
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
    # where exits stop early, no exit need have met all of them
    most = "up to " if "stopping" in told.run.summary else ""
    said = f"It was asked {most}{total:,} request{'s' * (total != 1)} at {where}: {listed(kinds)}."
    return said + (f" Suites: {listed(suites)}." if suites else "")


def _judges(told: Told, *, called: Mapping[str, str]) -> str:
    by_judge: dict[str, list[str]] = {}
    for metric in METRICS:
        judge = judge_of(metric, told.run.judges)
        if judge is not None and not metric.is_own and layer_estimates(told.run.summary, metric.name):
            by_judge.setdefault(judge, []).append(_in_list(told.run.title(metric.name)))
    if not by_judge:
        return "No judge scored its answers."
    said = "; ".join(f"{listed(metrics)} by {called[judge]}" for judge, metrics in by_judge.items())
    results = told.run.summary["judges"]
    spoke = [name for name, _ in told.run.judges if any(row["metrics"] for row in results[name]["layers"])]
    others = [called[name] for name in spoke if name not in by_judge]
    return f"Judged: {said}." + (f" A second opinion came from {listed(others)}." if others else "")


def _in_list(title: str) -> str:
    """A title among others, e.g. `attack success`."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _worst(runs: Sequence[Told]) -> Iterator[str]:
    for told in runs:
        yield _worst_of(shown(told.label), told.run)
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
                f"{_asr(told.run.summary, other['exit_layer'], other)}. Which exit is worst is not certain."
            )


def _worst_of(label: str, run: AuditRun) -> str:
    summary, attacks = run.summary, as_noun(run.title("asr"))
    at_exits, default = layer_estimates(summary, "asr"), summary["default_exit"]
    worst = summary["worst"].get("asr")
    if not at_exits:
        return f"{label}: {attacks} was not measured, so no exit can be called worst."
    if len(at_exits) == 1:
        exit_layer, found = next(iter(at_exits.items()))
        return f"{label}: only exit {exit_layer} was audited; {attacks} there is {_asr(summary, exit_layer, found)}."
    if worst is None:
        said = f"{label}: too few answers were scored to choose a worst exit on one half and measure it on the other"
    else:
        rate = _asr(summary, worst["exit_layer"], worst)
        said = f"{label}: at the worst exit, {worst['exit_layer']}, {attacks} is {rate}"
    if default in at_exits:
        what = attacks if worst is None else "it"
        return f"{said}; at the default exit, {default}, {what} is {_asr(summary, default, at_exits[default])}."
    return f"{said}; the default exit, {default}, was not audited."


def _asr(summary: Summary, exit_layer: int, found: Mapping[str, Any]) -> str:
    return estimate("asr", found, level=interval_level(summary, exit_layer))


def _usefulness(told: Told) -> Passage:
    summary, said = told.run.summary, []
    for metric in COSTS:
        found, default = layer_estimates(summary, metric), summary["default_exit"]
        if default in found:
            said.append(
                f"{as_opening(told.run.title(metric))} at the default exit, {default}, is "
                f"{estimate(metric, found[default])}."
            )
        elif not found and metric != "benign_refusal":
            said.append(f"{as_opening(told.run.title(metric))} was not measured.")
    table = worst_table([(shown(told.label), told.run)], COSTS)
    return Passage(heading="Over-refusal and usefulness", sentences=tuple(said), table=table)


def _stopped(told: Told) -> Iterator[str]:
    stopping = told.run.summary.get("stopping")
    if stopping is None:
        return
    by_decision: dict[str | None, list[int]] = {}
    for row in stopping["layers"]:
        by_decision.setdefault(row["decision"], []).append(row["exit_layer"])
    limit = percent(stopping["max_asr"])
    words = {"below": f"at most {limit}", "above": f"above {limit}", None: "still open at the end"}
    judge = shown(without_folder(stopping["judge"]))
    attacks = as_noun(told.run.title("asr", stopping["judge"]))
    parts = [f"{_named(by_decision[key])} {text}" for key, text in words.items() if key in by_decision]
    yield (
        f"{shown(told.label)}: an exit was stopped once it was settled whether {attacks} there is at most "
        f"{limit} (error level {stopping['error']:.0%}, by {judge}): {'; '.join(parts)}."
    )
    yield (
        f"Exits that stopped rest on fewer answers; {attacks} there has the {1 - stopping['error']:.0%} interval "
        "that holds at every look. Means over exits and tests that include them are a guide only."
    )


def _named(exit_layers: list[int]) -> str:
    return f"exit{'' if len(exit_layers) == 1 else 's'} {number_list(exit_layers)}"
