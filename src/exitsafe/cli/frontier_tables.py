"""A frontier for people: two tables, safety with use and cost, and what follows, in words. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from exitsafe.cli.doctor_tables import readable
from exitsafe.cli.tables import caution_lines
from exitsafe.frontier import Frontier, Miss, Point, Time
from exitsafe.runs.bounds import Bounded
from exitsafe.runs.metrics import as_noun, as_opening
from exitsafe.runs.numbers import beside_limit, interval, percent, significant

_WAYS = {"max_asr": "at most", "max_over_refusal": "at most", "min_vqa": "at least", "max_ms": "at most"}
"""For each limit, the side that its bound is on."""
_METRICS = {"asr": "max_asr", "over_refusal": "max_over_refusal", "vqa_accuracy": "min_vqa"}


def frontier_tables(frontier: Frontier) -> list[Any]:
    """Cautions, tables, notes and, last, the recommendation."""
    tables: list[Any] = [caution_lines(frontier.cautions)] if frontier.cautions else []
    tables.append(_safety_table(frontier))
    if any(point.times or point.flops_saved is not None for point in frontier.points):
        tables.append(_cost_table(frontier))
    notes = Group(*(Text(line, style="dim") for line in _notes(frontier)))
    return [*tables, notes, *_savings(frontier), *_recommendation(frontier)]


def _safety_table(frontier: Frontier) -> Table:
    names = [name for name in _METRICS if any(name in point.metrics for point in frontier.points)]
    table = Table(title=f"{frontier.model}: safe and useful, by exit layer", title_justify="left")
    table.add_column("exit")
    for name in names:
        table.add_column(f"{frontier.titles[name]}\n(95% interval)", justify="right")
        table.add_column(f"{_WAYS[_METRICS[name]]},\nall at once", justify="right")
    table.add_column("Pareto\nset")
    for point in frontier.points:
        cells = []
        for name in names:
            found = point.metrics.get(name)
            cells += ["", ""] if found is None else [_rate(name, found), percent(found.bound)]
        _add_row(table, frontier, point, [*cells, "yes" if point.is_pareto else ""])
    return table


def _cost_table(frontier: Frontier) -> Table:
    has_times = frontier.points[0].times is not None
    has_counts = frontier.points[0].flops_saved is not None
    table = Table(title="Cost of an exit, and what it saves against the default exit", title_justify="left")
    table.add_column("exit")
    headings = ["encoder\nms", "prefill\nms", "decoding\nms a token", "answer, ms\n(95% interval)", "time saved"]
    for heading in headings if has_times else []:
        table.add_column(heading, justify="right")
    for heading in ["operations\nsaved", "weights dropped\nby export"] if has_counts else []:
        table.add_column(heading, justify="right")
    for point in frontier.points:
        cells: list[str] = []
        if point.times is not None:
            times = point.times
            cells += [
                significant(each.median) for each in (times.encoder_ms, times.prefill_ms, times.decode_ms_per_token)
            ]
            cells += [_interval(times.answer_ms, significant), _interval(times.saved_share, percent)]
        if point.flops_saved_share is not None and point.bytes_saved is not None:
            cells += [percent(point.flops_saved_share), readable(point.bytes_saved)]
        _add_row(table, frontier, point, cells)
    return table


def _add_row(table: Table, frontier: Frontier, point: Point, cells: list[str]) -> None:
    is_default = point.exit_layer == frontier.default_exit
    name = f"{point.exit_layer} (default)" if is_default else str(point.exit_layer)
    is_chosen = point.exit_layer == frontier.recommended
    mark = " <- recommended" if is_chosen else ""
    style = "bold" if is_default or is_chosen else ""
    table.add_row(*(Text(cell, style=style) for cell in (name + mark, *cells)))


def _notes(frontier: Frontier) -> Iterator[str]:
    """How to read the tables."""
    confidence = f"{frontier.confidence:.0%}"
    yield (
        f"Bounds are made for choosing: with {confidence} confidence all {frontier.num_bounds} hold at once (a "
        f"gate's each by itself). {as_opening(frontier.titles['asr'])} is by {frontier.judge}."
    )
    unscored = sum(found.unscored for point in frontier.points for found in point.metrics.values())
    if unscored:
        yield f"Answers without a score ({unscored} in all) count against their exit in the bounds."
    if frontier.has_stopped:
        yield (
            f"The audit stopped exits early: bounds on {as_noun(frontier.titles['asr'])} hold at every look, and are "
            "wider for it."
        )
    yield "Pareto set: no shallower, so cheaper exit has bounds as good; with few samples also by luck."
    if "vqa_accuracy" not in frontier.points[0].metrics:
        yield "No VQA was audited: an exit that answers nonsense may look safe."
    if len(frontier.points) < frontier.num_layers:
        yield f"{len(frontier.points)} of {frontier.num_layers} exits were audited; of the others nothing is known."
    tokens = frontier.num_answer_tokens
    if frontier.num_passes:
        yield (
            f"Times: median of {frontier.num_passes} requests, one at a time, on this machine; an answer has {tokens} "
            "tokens. Preparing pictures is not timed."
        )
    saved = None if frontier.points[0].times is None else frontier.points[0].times.saved_share
    if saved is not None and (saved.low is None or saved.high is None or saved.low < 0 < saved.high):
        yield "Times scatter by more than exits differ: a quiet machine or more --samples would show what exits save."
    if frontier.is_prompt_measured is not None:
        prompt = "the run's largest prompt" if frontier.is_prompt_measured else "one picture and 64 tokens of text"
        blocks = "blocks behind the exit" + (" and the global blocks" if frontier.skip_global else "")
        yield (
            f"Operations: of {prompt} and {tokens} tokens of answer. Weights: {blocks}, of "
            f"{readable(frontier.model_bytes or 0)} in all."
        )


def _savings(frontier: Frontier) -> list[str]:
    """Whether early exit pays here at all."""
    if frontier.hardly_saves is None:
        return []
    shallowest = frontier.points[0].exit_layer
    times = frontier.points[0].times
    share = _shares({name: percent(value) for name, value in frontier.encoder_share.items()})
    saved = {name: percent(value) for name, value in frontier.most_saved.items()}
    if times is not None:
        saved["measured"] = _interval(times.saved_share, percent)
    verdict = "saves next to nothing on" if frontier.hardly_saves else "makes answers faster on"
    return [
        f"Early exit {verdict} this model: the encoder takes {share} before the first token; exit {shallowest} saves "
        f"{_shares(saved)} of an answer of {frontier.num_answer_tokens} tokens."
    ]


def _shares(found: dict[str, str]) -> str:
    words = {"measured": "of the measured time", "counted": "of the counted operations"}
    return " and ".join(f"{value} {words[name]}" for name, value in found.items())


def _recommendation(frontier: Frontier) -> list[str]:
    limits = frontier.limits.given
    if not limits:
        return ["For a recommendation give --max-asr and any of --min-vqa, --max-over-refusal, --max-ms."]
    sure = f"at {frontier.confidence:.0%} confidence over all exits"
    if frontier.recommended is not None:
        point = frontier.at(frontier.recommended)
        kept = ", ".join(_kept(frontier, point, limit, allowed) for limit, allowed in limits.items())
        others = [str(layer) for layer in frontier.qualifying if layer != point.exit_layer]
        also = f" Also qualify: {', '.join(others)}." if others else ""
        lines = [f"Recommended, {sure}: exit {point.exit_layer}, the cheapest that qualifies; {kept}.{also}"]
        if "max_asr" not in limits:
            bound = point.metrics["asr"].bound
            lines.append(f"No --max-asr was given: {as_noun(frontier.titles['asr'])} there may be {percent(bound)}.")
        return lines
    assert frontier.nearest is not None
    point = frontier.at(frontier.nearest)
    missed = "; ".join(_missed(frontier, point, miss) for miss in point.misses)
    return [f"No exit qualifies, {sure}. Nearest is exit {point.exit_layer}: {missed}."]


def _kept(frontier: Frontier, point: Point, limit: str, allowed: float) -> str:
    bound = point.times.bound if limit == "max_ms" and point.times else _metric(point, limit).bound
    name = _name(frontier, limit)
    return f"{name} {_WAYS[limit]} {_value(limit, bound, allowed)} (limit {_value(limit, allowed, allowed)})"


def _name(frontier: Frontier, limit: str) -> str:
    """What a limit is on."""
    if limit == "max_ms":
        return "an answer's time"
    return as_noun(next(frontier.titles[name] for name, its in _METRICS.items() if its == limit))


def _missed(frontier: Frontier, point: Point, miss: Miss) -> str:
    """What the bound is, what was seen, and whether more samples may help."""
    name = _name(frontier, miss.limit)
    way = "as low as" if miss.limit == "min_vqa" else "as high as"
    if miss.bound is None:
        why = "too few times were measured, give more --samples" if miss.limit == "max_ms" else "not measured there"
        return f"{name}: {why}"
    bound, allowed = (_value(miss.limit, value, miss.allowed) for value in (miss.bound, miss.allowed))
    words = f"{name} may be {way} {bound}, the limit is {allowed}"
    if miss.limit == "max_ms":
        return words
    seen = _metric(point, miss.limit)
    words += " (none scored)" if seen.value is None else f" (seen {percent(seen.value)}, n={seen.n})"
    if miss.samples_needed is not None:
        words += f"; about {miss.samples_needed} samples at this rate would do"
    return words


def _metric(point: Point, limit: str) -> Bounded:
    return next(point.metrics[name] for name, its in _METRICS.items() if its == limit)


def _value(limit: str, value: float | None, allowed: float) -> str:
    if value is None:
        return "unknown"
    if limit == "max_ms":
        return f"{significant(value)} ms"
    return beside_limit(next(name for name, its in _METRICS.items() if its == limit), value, allowed)


def _rate(metric: str, found: Bounded) -> str:
    if found.value is None or found.low is None or found.high is None:
        return f"none of {found.unscored} scored"
    shown = f"{percent(found.value)} ({interval(metric, found.low, found.high)})"
    return f"{shown}, {found.unscored} unscored" if found.unscored else shown


def _interval(time: Time, shown: Any) -> str:
    if time.low is None or time.high is None:
        return str(shown(time.median))
    return f"{shown(time.median)} ({shown(time.low)} to {shown(time.high)})"
