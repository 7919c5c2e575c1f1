"""The report in sentences: runs and comparisons in, passages out.

Every number comes with its interval and n. A difference is called what its test shows: lower, higher, or not shown to
differ. Nothing here calls a model safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from exitsafe.records import Kind
from exitsafe.results.comparison import Comparison, Difference
from exitsafe.results.metrics import METRICS, as_noun, as_opening, judge_of
from exitsafe.results.numbers import exits_named, listed
from exitsafe.results.run import AuditRun
from exitsafe.show.names import judge_names, shown, without_folder, without_folders
from exitsafe.show.tables import COSTS, LabelledRun, pairing_note, stopping_notes, worst_note
from exitsafe.show.verdict import Compared

_KINDS: Mapping[Kind, str] = {
    "harmful": "{} harmful (should be refused)",
    "borderline": "{} borderline (look harmful, should be answered)",
    "benign": "{} benign (should be answered)",
    "vqa": "{} picture questions with known answers",
}


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A heading and the sentences under it."""

    heading: str
    sentences: tuple[str, ...]


def findings(runs: Sequence[LabelledRun], compared: Compared) -> Iterator[Passage]:
    """What was tested, the worst exit, and what changed at what cost, in that order.

    Args:
        runs: The baseline first.
        compared: The other runs against it.
    """
    yield Passage(heading="What was tested", sentences=tuple(_tested(runs)))
    yield Passage(heading="The worst exit", sentences=tuple(_worst(runs)))
    for after, comparison in compared.items():
        heading = f"What changed from {runs[0][0]} to {after}"
        yield Passage(heading=heading, sentences=tuple(_changed(runs, comparison)))
    if stopped := tuple(_labelled(label, line) for label, run in runs for line in stopping_notes(run)):
        yield Passage(heading="Stopped early", sentences=stopped)


# ---- what was tested ----


def _tested(runs: Sequence[LabelledRun]) -> Iterator[str]:
    first = next((run for _, run in runs if not run.is_served), runs[0][1])
    name = model_name(first)
    if first.is_served:
        yield f"{name} was audited as it is served: nothing is known about its image encoder except what is claimed."
    else:
        yield (
            f"{name} is a vision-language model ({shown(str(first.summary['family']))}) whose image encoder has "
            f"{first.num_layers} blocks. An exit layer is the number of blocks that run before the language model "
            f"reads the picture; the untouched model uses exit {first.default_exit}, the default."
        )
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    # said once where all runs agree, otherwise run by run
    for said in ([_asked(run) for _, run in runs], [_judged(run, called) for _, run in runs]):
        if len(set(said)) == 1:
            yield said[0]
        else:
            yield from (_labelled(label, line) for (label, _), line in zip(runs, said, strict=True))
    for label, run in runs:
        adapter = run.settings.get("model", {}).get("adapter")
        what = "no adapter" if adapter is None else f"adapter {shown(adapter[:12])}"
        what = f"as served, at {exits_named(run.exit_layers)}" if run.is_served else what
        name = "" if model_name(run) == model_name(runs[0][1]) else f"{model_name(run)}, "
        yield f"{label}: {name}{what}{_finished(run)}."


def _labelled(label: str, line: str) -> str:
    """A sentence about one run."""
    return f"{label}: {line[:1].lower()}{line[1:]}"


def model_name(run: AuditRun) -> str:
    """The model's name, as it may be shown."""
    return shown(without_folder(str(run.summary["model"])))


def _finished(run: AuditRun) -> str:
    path = run.path / "summary.json"
    if not path.exists():
        return ""
    day = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return f", finished on {day.day} {day:%B %Y}"


def _asked(run: AuditRun) -> str:
    exits, num_layers = run.exit_layers, run.num_layers
    counts = Counter(sample.kind for sample in run.score_table().samples)
    where = f"each of the {num_layers} exits" if len(exits) == num_layers else exits_named(exits)
    kinds = [text.format(f"{counts[kind]:,}") for kind, text in _KINDS.items() if counts[kind]]
    sources = run.settings.get("data", {}).get("sources", {})
    suites = [f"{shown(without_folder(name)) or 'unnamed'} ({n:,})" for name, n in sources.items()]
    # where exits stop early, an exit may not have received all of them
    most = "up to " if "stopping" in run.summary else ""
    total = counts.total()
    said = f"It received {most}{total:,} request{'s' * (total != 1)} at {where}: {listed(kinds)}."
    return said + (f" Suites: {listed(suites)}." if suites else "")


def _judged(run: AuditRun, called: Mapping[str, str]) -> str:
    by_judge: dict[str, list[str]] = {}
    for metric in METRICS:
        judge = judge_of(metric, run.judges)
        if judge is not None and not metric.is_own and run.at_exits(metric.name):
            by_judge.setdefault(judge, []).append(as_noun(run.title(metric.name)))
    if not by_judge:
        return "No judge scored its answers."
    said = "; ".join(f"{called[judge]} ({listed(metrics)})" for judge, metrics in by_judge.items())
    results = run.summary["judges"]
    scored = [name for name, _ in run.judges if any(row["metrics"] for row in results[name]["layers"])]
    others = [called[name] for name in scored if name not in by_judge]
    return f"Judges: {said}." + (f" Second opinions: {listed(others)}." if others else "")


# ---- the worst exit ----


def _worst(runs: Sequence[LabelledRun]) -> Iterator[str]:
    if any(run.worst("asr") for _, run in runs):
        yield (
            "A worst exit is chosen on one half of the harmful requests and measured on the other, so that the choice "
            "does not inflate its rate."
        )
    for label, run in runs:
        if run.worst("asr"):
            yield f"{label}: {worst_note(run)}."
        else:
            yield f"{label}: {_WITHOUT_WORST[min(len(run.at_exits('asr')), 2)]}, so no worst exit is given."


_WITHOUT_WORST = (
    "attack success was not measured",
    "only one exit was audited",
    "too few answers were scored to choose an exit on one half and measure it on the other",
)


# ---- what changed ----


def _changed(runs: Sequence[LabelledRun], comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        yield "Unknown: the two runs share no request, or no exit."
        return
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    for line in comparison.repairs_changed:
        line = without_folders(line, called)
        yield f"{line[:1].upper()}{line[1:]}."
    yield pairing_note(comparison)
    for metric in ("asr", *COSTS):
        rows = comparison.rows(metric)
        if rows:
            said = "; ".join(
                f"{where}: {row.values}, {row.outcome} ({row.evidence})" for row, where in _at_places(comparison, rows)
            )
            yield f"{as_opening(comparison.titles[metric])}, {said}."
        elif metric != "benign_refusal":  # a second look at over-refusal: not a gap if missing
            title = as_opening(runs[0][1].title(metric))
            yield f"{title} was not measured in both runs on the same requests, so its change is unknown."
        if metric == "asr" and rows:
            yield f"Exit by exit, with tests corrected for their number, it is {comparison.by_exit('asr')}."


def _at_places(comparison: Comparison, rows: Sequence[Difference]) -> Iterator[tuple[Difference, str]]:
    """On average and at the default exit."""
    num_exits, default = len(comparison.exit_layers), comparison.default_exit
    which = f"all {num_exits} exits" if num_exits == comparison.num_layers else f"the {num_exits} exits compared"
    for row in rows:
        if row.place == "average":
            yield row, f"averaged over {which} (early, middle and late weighted equally)"
    for row in rows:
        if row.place == default:
            yield row, f"at the default exit, {default}"


# ---- limits ----


def limits(runs: Sequence[LabelledRun], compared: Compared) -> Iterator[str]:
    """What must not be concluded from the numbers; only what applies to these runs."""
    yield (
        "The numbers are about these requests and others like them. A low rate does not prove that a model is safe: "
        "other requests, languages, pictures and attacks were not tried."
    )
    yield (
        "Verdicts come from automatic judges, which make mistakes. The intervals reflect the choice of requests, not "
        "errors of the judges."
    )
    if any(name == "world-rule" for _, run in runs for name, _ in run.judges):
        yield (
            "The requests are those of a small synthetic test model, which knows only invented things. They show that "
            "the method works, but say nothing about other models."
        )
    temperatures = {run.settings.get("decoding", {}).get("temperature") for _, run in runs} - {None}
    if temperatures == {0.0}:
        yield "Each request was answered once, by greedy decoding. Other ways of decoding may give other answers."
    elif temperatures:
        yield "Each request was answered once, from one random draw. Another draw may give another answer."
    for label, run in runs:
        yield from _gaps(label, run)
    if any(run.summary["worst"] for _, run in runs):
        yield "Rates at worst exits rest on half of the requests, since the other half chose; their intervals show it."
    yield "Seconds are an answer's share of the time of mixed batches, not a latency that a user would see."
    if any(comparison is not None for comparison in compared.values()):
        yield (
            "Runs are compared request by request. A difference that was not shown may still exist: its interval says "
            "how large it could be. p-values are corrected over the exits of one metric, not over metrics."
        )


def _gaps(label: str, run: AuditRun) -> Iterator[str]:
    unscored = {
        as_noun(metric.title): sum(found.unscored for found in run.at_exits(metric.name).values()) for metric in METRICS
    }
    if missing := [f"{title} {n:,}" for title, n in unscored.items() if n]:
        yield (
            f"{label}: answers that could not be scored are not in any rate ({', '.join(missing)}, over all exits). "
            "If they differ from the others, the rates are biased."
        )
    num_layers, num_exits = run.num_layers, len(run.exit_layers)
    if num_exits < num_layers:
        num_missing = num_layers - num_exits
        yield f"{label}: {num_missing} of {num_layers} exits were not audited, and nothing is known about them."


def settings_changed(runs: Sequence[LabelledRun], compared: Compared) -> list[str]:
    """What differs between audits besides the model, one line each."""
    called = judge_names(name for _, run in runs for name, _ in run.judges)
    return [
        f"{runs[0][0]} and {after}: {without_folders(line, called)}."
        for after, comparison in compared.items()
        if comparison is not None
        for line in comparison.settings_changed
    ]
