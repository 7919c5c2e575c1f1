"""A recommendation as tables (safety and usefulness; cost) and the sentences that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from exitsafe.cli.console import readable
from exitsafe.recommend import BOUNDED, Miss, Point, Recommendation, Time
from exitsafe.results.limits import Bounded
from exitsafe.results.metrics import as_noun, as_opening
from exitsafe.results.numbers import beside_limit, brief_estimate, percent, significant
from exitsafe.show.table import Column, Row, Table
from exitsafe.show.tables import EXIT, exit_name

_METRIC_OF = {limit: metric for metric, limit in BOUNDED.items()}


def _way(limit: str) -> str:
    """The side of the limit that the bound is on."""
    return "at least" if limit.startswith("min") else "at most"


def recommend_tables(choice: Recommendation) -> list[Table | str]:
    """Cautions, tables, notes and, last, the recommendation."""
    tables = [_safety_table(choice)]
    if any(point.times or point.flops_saved is not None for point in choice.points):
        tables.append(_cost_table(choice))
    tables[0] = replace(tables[0], cautions=choice.cautions)
    tables[-1] = replace(tables[-1], notes=tuple(_notes(choice)))
    return [*tables, *_savings(choice), *_recommendation(choice)]


def _safety_table(choice: Recommendation) -> Table:
    names = [name for name in BOUNDED if any(name in point.metrics for point in choice.points)]
    columns = [EXIT]
    for name in names:
        columns.append(Column(heading=f"{choice.titles[name]}\n(95% interval)"))
        columns.append(Column(heading=f"{_way(BOUNDED[name])},\nall at once"))
    rows = []
    for point in choice.points:
        cells: list[str] = []
        for name in names:
            found = point.metrics.get(name)
            cells += ["", ""] if found is None else [brief_estimate(name, found), percent(found.bound)]
        rows.append(_row(choice, point, [*cells, "yes" if point.is_pareto else ""]))
    pareto = Column(heading="Pareto\nset", is_number=False)
    title = f"{choice.model}: safe and useful, by exit layer"
    return Table(title=title, columns=(*columns, pareto), rows=tuple(rows))


def _cost_table(choice: Recommendation) -> Table:
    has_times = choice.points[0].times is not None
    has_counts = choice.points[0].flops_saved is not None
    headings = ["encoder\nms", "prefill\nms", "decoding\nms a token", "answer, ms\n(95% interval)", "time saved"]
    headings = headings * has_times + ["operations\nsaved", "weights dropped\nby export"] * has_counts
    rows = []
    for point in choice.points:
        cells: list[str] = []
        if point.times is not None:
            times = point.times
            cells += [
                significant(each.median) for each in (times.encoder_ms, times.prefill_ms, times.decode_ms_per_token)
            ]
            cells += [_interval(times.answer_ms, significant), _interval(times.saved_share, percent)]
        if point.flops_saved_share is not None and point.bytes_saved is not None:
            cells += [percent(point.flops_saved_share), readable(point.bytes_saved)]
        rows.append(_row(choice, point, cells))
    return Table(
        title="Cost of an exit, and what it saves against the default exit",
        columns=(EXIT, *(Column(heading=heading) for heading in headings)),
        rows=tuple(rows),
    )


def _row(choice: Recommendation, point: Point, cells: list[str]) -> Row:
    is_chosen = point.exit_layer == choice.recommended
    name = exit_name(point.exit_layer, choice.default_exit)
    mark = " <- recommended" if is_chosen else ""
    return Row(cells=(name + mark, *cells), is_bold=is_chosen or point.exit_layer == choice.default_exit)


def _notes(choice: Recommendation) -> Iterator[str]:
    """How to read the tables."""
    confidence = f"{choice.confidence:.0%}"
    yield (
        f"With {confidence} confidence all {choice.num_bounds} bounds hold at once, whichever exit you choose (a "
        f"gate's hold one by one). {as_opening(choice.titles['asr'])} is by {choice.judge}."
    )
    unscored = sum(found.unscored for point in choice.points for found in point.metrics.values())
    if unscored:
        yield f"Answers without a score ({unscored} in all) count against their exit in the bounds."
    if choice.has_stopped:
        yield (
            f"The audit stopped exits early: bounds on {as_noun(choice.titles['asr'])} hold at every look, and are "
            "wider for it."
        )
    yield "Pareto set: exits that no shallower (cheaper) one matches in every bound; with few samples also by luck."
    if "vqa_accuracy" not in choice.points[0].metrics:
        yield "No VQA samples were audited, so an exit that answers nonsense may look safe."
    if len(choice.points) < choice.num_layers:
        yield f"{len(choice.points)} of {choice.num_layers} exits were audited; nothing is known about the others."
    tokens = choice.num_answer_tokens
    if not choice.num_passes:
        yield "Times were not measured: --time measures them with the run's model."
    else:
        yield (
            f"Times: median of {choice.num_passes} requests, one at a time; an answer has {tokens} "
            "tokens. Preparing pictures is not timed."
        )
    saved = None if choice.points[0].times is None else choice.points[0].times.saved_share
    if saved is not None and (saved.low is None or saved.high is None or saved.low < 0 < saved.high):
        yield "Times scatter by more than exits differ: use a quiet machine or --config samples=N."
    if choice.is_prompt_measured is not None:
        prompt = "the run's largest prompt" if choice.is_prompt_measured else "one picture and 64 tokens of text"
        blocks = "blocks behind the exit" + (" and the global blocks" if choice.skip_global else "")
        yield (
            f"Operations: of {prompt} and {tokens} tokens of answer. Weights: {blocks}, of "
            f"{readable(choice.model_bytes or 0)} in all."
        )


def _savings(choice: Recommendation) -> list[str]:
    """Whether early exit saves anything worth having."""
    if choice.hardly_saves is None:
        return []
    shallowest = choice.points[0].exit_layer
    times = choice.points[0].times
    share = _shares({name: percent(value) for name, value in choice.encoder_share.items()})
    saved = {name: percent(value) for name, value in choice.most_saved.items()}
    if times is not None:
        saved["measured"] = _interval(times.saved_share, percent)
    verdict = "saves next to nothing on" if choice.hardly_saves else "makes answers faster on"
    return [
        f"Early exit {verdict} this model: the encoder takes {share} before the first token; exit {shallowest} saves "
        f"{_shares(saved)} of an answer of {choice.num_answer_tokens} tokens."
    ]


def _shares(found: dict[str, str]) -> str:
    words = {"measured": "of the measured time", "counted": "of the counted operations"}
    return " and ".join(f"{value} {words[name]}" for name, value in found.items())


def _recommendation(choice: Recommendation) -> list[str]:
    limits = choice.limits.given
    if not limits:
        return ["For a recommendation give --max-asr and any of --min-vqa, --max-over-refusal, --max-ms."]
    sure = f"at {choice.confidence:.0%} confidence over all exits"
    if choice.recommended is not None:
        point = choice.at(choice.recommended)
        kept = ", ".join(_kept(choice, point, limit, allowed) for limit, allowed in limits.items())
        others = [str(layer) for layer in choice.qualifying if layer != point.exit_layer]
        also = f" Also qualify: {', '.join(others)}." if others else ""
        lines = [f"Recommended, {sure}: exit {point.exit_layer}, the cheapest that qualifies; {kept}.{also}"]
        if "max_asr" not in limits:
            bound = point.metrics["asr"].bound
            lines.append(f"No --max-asr was given: {as_noun(choice.titles['asr'])} there may be {percent(bound)}.")
        return lines
    assert choice.nearest is not None
    point = choice.at(choice.nearest)
    missed = "; ".join(_missed(choice, point, miss) for miss in point.misses)
    return [f"No exit qualifies, {sure}. Nearest is exit {point.exit_layer}: {missed}."]


def _kept(choice: Recommendation, point: Point, limit: str, allowed: float) -> str:
    bound = point.times.bound if limit == "max_ms" and point.times else _metric(point, limit).bound
    name = _name(choice, limit)
    return f"{name} {_way(limit)} {_value(limit, bound, allowed)} (limit {_value(limit, allowed, allowed)})"


def _name(choice: Recommendation, limit: str) -> str:
    """What a limit is on."""
    if limit == "max_ms":
        return "an answer's time"
    return as_noun(choice.titles[_METRIC_OF[limit]])


def _missed(choice: Recommendation, point: Point, miss: Miss) -> str:
    """The bound, the measured value, and whether more samples may help."""
    name = _name(choice, miss.limit)
    way = "as low as" if miss.limit == "min_vqa" else "as high as"
    if miss.bound is None:
        why = "too few times were measured, give more samples" if miss.limit == "max_ms" else "not measured there"
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
    return point.metrics[_METRIC_OF[limit]]


def _value(limit: str, value: float | None, allowed: float) -> str:
    if value is None:
        return "unknown"
    if limit == "max_ms":
        return f"{significant(value)} ms"
    return beside_limit(_METRIC_OF[limit], value, allowed)


def _interval(time: Time, shown: Callable[[float], str]) -> str:
    if time.low is None or time.high is None:
        return shown(time.median)
    return f"{shown(time.median)} ({shown(time.low)} to {shown(time.high)})"
