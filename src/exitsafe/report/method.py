"""How the runs were made, and what the page cannot show: run.json and summaries in, tables and sentences out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exitsafe.report.facts import Row, Table
from exitsafe.report.names import judge_names, shown, without_folder, without_folders
from exitsafe.report.told import Compared, Told
from exitsafe.runs.metrics import METRICS
from exitsafe.runs.numbers import listed, number_list

_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{16,}\b")
_MAX_LENGTH = 400


def method_table(runs: Sequence[Told]) -> Table:
    """What decides a run's answers and verdicts, a column per run; one that several runs share is said once."""
    called = judge_names(name for told in runs for name, _ in told.run.judges)
    facts = [dict(_facts(told, called)) for told in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    return Table(
        caption="What the runs are of and how they were made",
        columns=("setting", *(shown(told.label) for told in runs)),
        rows=tuple(Row(cells=(name, *(found.get(name, "") for found in facts))) for name in names),
        num_names=1 + len(runs),
    )


def set_otherwise(runs: Sequence[Told], compared: Sequence[Compared]) -> list[str]:
    """What differs between audits beside the model, one line each."""
    called = judge_names(name for told in runs for name, _ in told.run.judges)
    return [
        f"{shown(pair.before)} and {shown(pair.after)}: {without_folders(line, called)}."
        for pair in compared
        if pair.comparison is not None
        for line in pair.comparison.settings_changed
    ]


def limits(runs: Sequence[Told], compared: Sequence[Compared]) -> Iterator[str]:
    """What must not be read out of the numbers; only what applies to these runs."""
    yield (
        "The numbers are about these requests and others like them. A low rate is no proof that a model is safe: "
        "other requests, languages, pictures or attacks were not tried."
    )
    yield (
        "Verdicts are those of automatic judges, which err. The intervals are about the draw of requests, not about "
        "the judges."
    )
    called = judge_names(name for told in runs for name, _ in told.run.judges)
    for caution, labels in _cautions(runs).items():
        who = "" if len(labels) == len(runs) else f"{listed(labels)}: "
        yield f"{who}{without_folders(caution, called)}."
    if any(name == "world-rule" for told in runs for name, _ in told.run.judges):
        yield (
            "The requests are those of a small synthetic test model, which knows invented things only. It shows that "
            "the method works; its numbers say nothing about other models."
        )
    yield from _decoding(runs)
    for told in runs:
        if line := _unscored(told):
            yield line
        num_layers, exits = told.run.summary["num_layers"], told.run.exit_layers
        if len(exits) < num_layers:
            missing = f"{num_layers - len(exits)} of {num_layers} exits"
            yield f"{shown(told.label)}: {missing} were not audited; nothing is known of them."
    if any(told.run.summary["worst"] for told in runs):
        yield "Rates at worst exits rest on half of the requests, since the other half chose; their intervals show it."
    yield "Seconds are an answer's share of the time of mixed batches: they show no latency that a user would meet."
    if any(pair.comparison is not None for pair in compared):
        yield (
            "Runs are compared request by request. A difference that could not be shown may still be there: its "
            "interval says how large it could be. p-values are corrected over the exits of one metric, not over "
            "metrics."
        )


def _cautions(runs: Sequence[Told]) -> dict[str, list[str]]:
    """Each caution with the labels of the runs that it is about."""
    found: dict[str, list[str]] = {}
    for told in runs:
        for line in told.run.cautions:
            found.setdefault(line, []).append(shown(told.label))
    return found


def _facts(told: Told, called: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    settings, summary = told.run.settings, told.run.summary
    model: Mapping[str, Any] = settings.get("model", {})
    yield "model", shown(without_folder(str(summary["model"])))
    yield "family, blocks, default exit", f"{summary['family']}, {summary['num_layers']}, {summary['default_exit']}"
    yield "exits audited", number_list(list(told.run.exit_layers))
    for name in ("checkpoint", "adapter", "translators"):
        if name in model:
            yield name, "none" if model[name] is None else f"SHA-256 {model[name]}"
    for name in ("dtype", "quantization", "device", "attention", "processor"):
        if name in model:
            yield name, _spelt(model[name])
    for name in ("decoding", "batch_size", "skip_global", "stop_when"):
        if name in settings:
            yield name.replace("_", " "), _spelt(settings[name])
    data = settings.get("data", {})
    for suite, n in data.get("sources", {}).items():
        yield f"suite {shown(without_folder(suite)) or 'unnamed'}", f"{n:,} requests{_revision(told.run.origin, suite)}"
    if "hash" in data:
        yield "requests", f"SHA-256 {data['hash']}"
    for name in ("split", "seed", "limit"):
        if told.run.origin.get(name) is not None:
            yield f"suites: {name}", _spelt(told.run.origin[name])
    for judge in settings.get("judges", ()):
        yield f"judge {called[judge['name']]}", _spelt(judge.get("settings", {}))
    for package, version in settings.get("versions", {}).items():
        yield f"version of {shown(package)}", shown(str(version))


def _revision(origin: Mapping[str, Any], suite: str) -> str:
    """The commit that a suite of the Hub was read at."""
    found = (origin.get("hub") or {}).get(suite)
    return "" if not found else f", {_spelt(found)}"


def _decoding(runs: Sequence[Told]) -> Iterator[str]:
    temperatures = {told.run.settings.get("decoding", {}).get("temperature") for told in runs} - {None}
    if temperatures == {0.0}:
        yield "Each request was answered once, by the likeliest words. Other ways of decoding may answer otherwise."
    elif temperatures:
        yield "Each request was answered once, from one random draw. Another draw may give another answer."


def _unscored(told: Told) -> str | None:
    """Answers that a judge could not score, metric by metric."""
    found = []
    for metric in METRICS:
        missing = sum(row["metrics"].get(metric.name, {}).get("unscored", 0) for row in told.run.summary["layers"])
        if missing:
            found.append(f"{metric.title.lower()} {missing:,}")
    if not found:
        return None
    return (
        f"{shown(told.label)}: answers that could not be scored are in no rate ({', '.join(found)}, over all exits). "
        "If they differ from the others, the rates are off."
    )


def _spelt(value: Any) -> str:
    """A setting in a line, e.g. `seed 0, temperature 0.0`; folders of this machine left out, hashes cut."""
    return shown(_plain(value), max_length=_MAX_LENGTH)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = (
            f"{name} ({_plain(part)})" if isinstance(part, Mapping) else f"{name} {_plain(part)}"
            for name, part in value.items()
        )
        return ", ".join(parts) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return _HASH.sub(r"\1…", without_folder(str(value)))
