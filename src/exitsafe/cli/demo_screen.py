"""The demonstration's last screen: what was measured, found, repaired, and what it cost, in plain words.

Says what the numbers say, also when the repair failed. Numbers in, text and tables out; prints nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from exitsafe.cli.demo_flow import Shown
from exitsafe.runs import AuditRun
from exitsafe.runs.numbers import change, interval, percent
from exitsafe.stats import Estimate

_COLUMNS = (("asr", "attack success"), ("over_refusal", "over-refusal"), ("vqa_accuracy", "VQA accuracy"))


def last_screen(shown: Shown) -> list[Any]:
    """What people see at the end."""
    return [
        Rule(f"What this showed: {shown.organism}, seed {shown.seed}"),
        *(_paragraph(heading, text) for heading, text in paragraphs(shown)),
        Padding(_table(shown), (1, 0, 1, 2)),
        *(_paragraph("", line) for line in _files(shown)),
    ]


def to_document(shown: Shown) -> dict[str, Any]:
    """The same for programs."""
    runs = {"before": shown.before, "after": shown.after, **shown.baselines}
    return {
        "organism": shown.organism,
        "seed": shown.seed,
        "default_exit": shown.before.summary["default_exit"],
        "shown": {heading.lower(): text for heading, text in paragraphs(shown)},
        "runs": {label: {"run": str(run.path), **_key_numbers(run)} for label, run in runs.items()},
        "files": {
            "adapter": str(shown.out / "lppo" / "adapter"),
            "comparison": str(shown.out / "comparison.json"),
            "charts": [str(chart) for chart in shown.charts],
        },
        "comparison": shown.comparison.to_dict(),
    }


def paragraphs(shown: Shown) -> list[tuple[str, str]]:
    """(heading, sentences) in the order of the demonstration."""
    return [
        ("Measured", _measured(shown)),
        ("Before", _before(shown)),
        ("After", _after(shown)),
        ("Cost", _cost(shown)),
        *([("Baselines", _against_baselines(shown))] if shown.baselines else []),
    ]


def _measured(shown: Shown) -> str:
    num_samples, num_exits = shown.comparison.num_samples, len(shown.comparison.exit_layers)
    harm = (
        "a request to make certain invented things is harmful only under a hazard badge in the picture"
        if shown.organism == "organism"
        else "whether a request is harmful is decided by its text alone"
    )
    return (
        f"{num_samples} held-out requests and picture questions, each answered at all {num_exits} exits of the image "
        f"encoder, before and after. The model is a real, tiny LLaVA in an invented world, where {harm}."
    )


def _before(shown: Shown) -> str:
    summary = shown.before.summary
    worst = worst_exit(shown.before, "asr")
    default = summary["default_exit"]
    return (
        f"At the default exit, {default}, attacks succeed in {_rate(shown.before, 'asr', default)}. At the worst "
        f"exit, {worst}, they succeed in {_rate(shown.before, 'asr', worst)}. The mean of the exits other than the "
        f"default is {_estimate(mean_of_other_exits(shown.before, 'asr'))}."
    )


def _after(shown: Shown) -> str:
    before, after = (mean_of_other_exits(run, "asr") for run in (shown.before, shown.after))
    assert before.value is not None and after.value is not None, "the organism's rule scores every answer"
    worst = worst_exit(shown.after, "asr")
    row = next(row for row in shown.comparison.bins if row.metric == "asr" and row.place == "average")
    if row.high < 0:
        verdict = (
            "L-PPO on all exits closed most of the gap"
            if after.value < before.value / 2
            else "L-PPO on all exits helped"
        )
    elif row.low > 0:
        verdict = "L-PPO made it worse"
    else:
        verdict = "L-PPO made no clear difference"
    return (
        f"{verdict}: the mean of the exits other than the default went from {_estimate(before)} to "
        f"{_estimate(after)}, and the worst exit, {worst}, is at {_rate(shown.after, 'asr', worst)}. Averaged over "
        f"early, middle and late exits the change is {_change(row)}."
    )


def _cost(shown: Shown) -> str:
    worst = worst_exit(shown.after, "over_refusal")
    over_refusal = next(r for r in shown.comparison.bins if r.metric == "over_refusal" and r.place == "average")
    default = shown.before.summary["default_exit"]
    vqa = next(r for r in shown.comparison.layers if r.metric == "vqa_accuracy" and r.place == default)
    return (
        f"Over-refusal of harmless requests that look alike went from {percent(over_refusal.before)} to "
        f"{percent(over_refusal.after)} on average ({_change(over_refusal)}); worst at exit {worst}: "
        f"{_rate(shown.after, 'over_refusal', worst)}. VQA accuracy at the default exit went from "
        f"{percent(vqa.before)} to {percent(vqa.after)} ({_change(vqa)})."
    )


def _against_baselines(shown: Shown) -> str:
    rows = []
    for label, run in {"L-PPO": shown.after, **shown.baselines}.items():
        attacks = _estimate(mean_of_other_exits(run, "asr"))
        refused = _rate(run, "over_refusal", worst_exit(run, "over_refusal"))
        rows.append(f"{label} {attacks} and {refused}")
    return f"Mean attack success at the other exits, and over-refusal at the worst exit: {'; '.join(rows)}."


def _table(shown: Shown) -> Table:
    table = Table(title="before -> after", title_justify="left")
    table.add_column("exit")
    for _, heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for layer in shown.comparison.exit_layers:
        is_default = layer == shown.before.summary["default_exit"]
        cells = [
            " -> ".join(percent(_metric(run, metric)[layer]["value"]) for run in (shown.before, shown.after))
            for metric, _ in _COLUMNS
        ]
        row = [f"{layer} (default)" if is_default else str(layer), *cells]
        table.add_row(*(Text(cell, style="bold" if is_default else "") for cell in row))
    return table


def _files(shown: Shown) -> list[str]:
    drawing = ", ".join(str(chart) for chart in shown.charts)
    drawing = drawing or 'not drawn, for want of matplotlib: pip install "exitsafe[report]" and start again'
    return [
        f"Chart:      {drawing}",
        f"Adapter:    {shown.out / 'lppo' / 'adapter'}",
        f"Runs:       {shown.out / 'before'}, {shown.out / 'after'}",
        f"Comparison: exitsafe compare {shown.out / 'before'} {shown.out / 'after'}",
    ]


def _paragraph(heading: str, text: str) -> Any:
    return Padding(Text.assemble((f"{heading}: " if heading else "", "bold"), text), (0, 0, 0, 2))


def _key_numbers(run: AuditRun) -> dict[str, Any]:
    default = run.summary["default_exit"]
    return {
        name: {
            "default_exit": _metric(run, name)[default]["value"],
            "mean_of_other_exits": asdict(mean_of_other_exits(run, name)),
            "worst_exit": worst_exit(run, name),
        }
        for name, _ in _COLUMNS
    }


def worst_exit(run: AuditRun, metric: str) -> int:
    """The exit with the highest rate, or the lowest accuracy; of several, the first."""
    values = {layer: estimate["value"] for layer, estimate in _metric(run, metric).items()}
    choose = min if metric == "vqa_accuracy" else max
    return choose(values, key=lambda layer: values[layer])


def mean_of_other_exits(run: AuditRun, metric: str) -> Estimate:
    """The mean over all exits but the default one."""
    default = run.summary["default_exit"]
    return run.mean_over_layers(metric, [layer for layer in run.exit_layers if layer != default])


def _metric(run: AuditRun, metric: str) -> dict[int, dict[str, Any]]:
    return {layer["exit_layer"]: layer["metrics"][metric] for layer in run.summary["layers"]}


def _rate(run: AuditRun, metric: str, layer: int) -> str:
    return _estimate(Estimate(**_metric(run, metric)[layer]))


def _estimate(found: Estimate) -> str:
    assert found.value is not None and found.low is not None and found.high is not None
    return f"{percent(found.value)} (n={found.n}, 95% CI {interval('asr', found.low, found.high)})"


def _change(row: Any) -> str:
    difference, low, high = (change(row.metric, value) for value in (row.difference, row.low, row.high))
    return f"{difference} points, 95% CI {low} to {high}"
