"""The demonstration's last screen: what was measured, found and repaired, in the words of the report page.

Says what the numbers say, also if the repair failed. Numbers in, text and tables out; prints nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from exitsafe.cli.demo_flow import Shown
from exitsafe.results.comparison import compare
from exitsafe.results.metrics import BY_NAME, as_noun
from exitsafe.results.numbers import percent
from exitsafe.results.run import AuditRun
from exitsafe.show.table import Column, Row, Table
from exitsafe.show.tables import EXIT, exit_name
from exitsafe.show.verdict import key_numbers, verdict
from exitsafe.stats import Estimate
from exitsafe.untrusted import JsonObject

_METRICS = ("asr", "over_refusal", "vqa_accuracy")


def last_screen(shown: Shown) -> list[Any]:
    """What people see at the end."""
    return [
        Rule(f"What this showed: {shown.organism}, seed {shown.seed}"),
        *(_paragraph(heading, text) for heading, text in paragraphs(shown)),
        Padding(_table(shown), (1, 0, 1, 2)),
        *(_paragraph("", line) for line in _files(shown)),
    ]


def to_document(shown: Shown) -> JsonObject:
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
    """(heading, sentences): what was measured, and the verdicts and numbers that open the report page."""
    before, after = ("before", shown.before), ("after", shown.after)
    found = [
        ("Measured", _measured(shown)),
        ("Before", verdict([before], {})),
        ("After", verdict([before, after], {"after": shown.comparison})),
    ]
    if shown.baselines:
        compared = {label: compare(shown.before, run) for label, run in shown.baselines.items()}
        found.append(("Baselines", verdict([before, *shown.baselines.items()], compared)))
    for number in key_numbers([before, after, *shown.baselines.items()]):
        found.append((number.title, "; ".join(f"{label} {value} ({rest})" for label, value, rest in number.values)))
    return found


def _measured(shown: Shown) -> str:
    num_samples, num_exits = shown.comparison.num_samples, len(shown.comparison.exit_layers)
    harm = (
        "a request to make certain invented things is harmful only if the picture shows a hazard badge"
        if shown.organism == "organism"
        else "the text of a request alone decides whether it is harmful"
    )
    return (
        f"{num_samples} held-out requests and picture questions, each answered at all {num_exits} exits of the image "
        f"encoder, before and after. The model is a real, tiny LLaVA in an invented world, where {harm}."
    )


def _table(shown: Shown) -> Table:
    default_exit = shown.before.summary["default_exit"]
    rows = []
    for layer in shown.comparison.exit_layers:
        cells = (
            " -> ".join(percent(_metric(run, metric)[layer]["value"]) for run in (shown.before, shown.after))
            for metric in _METRICS
        )
        rows.append(Row(cells=(exit_name(layer, default_exit), *cells), is_bold=layer == default_exit))
    headings = (Column(heading=as_noun(BY_NAME[metric].title)) for metric in _METRICS)
    return Table(title="before -> after", columns=(EXIT, *headings), rows=tuple(rows))


def _files(shown: Shown) -> list[str]:
    drawing = ", ".join(str(chart) for chart in shown.charts)
    drawing = drawing or 'not drawn: pip install "exitsafe[report]" and rerun the same command'
    return [
        f"Chart:      {drawing}",
        f"Adapter:    {shown.out / 'lppo' / 'adapter'}",
        f"Runs:       {shown.out / 'before'}, {shown.out / 'after'}",
        f"Comparison: exitsafe compare {shown.out / 'before'} {shown.out / 'after'}",
    ]


def _paragraph(heading: str, text: str) -> Any:
    return Padding(Text.assemble((f"{heading}: " if heading else "", "bold"), text), (0, 0, 0, 2))


def _key_numbers(run: AuditRun) -> JsonObject:
    default = run.summary["default_exit"]
    return {
        name: {
            "default_exit": _metric(run, name)[default]["value"],
            "mean_of_other_exits": asdict(mean_of_other_exits(run, name)),
            "worst_exit": worst_exit(run, name),
        }
        for name in _METRICS
    }


def worst_exit(run: AuditRun, metric: str) -> int:
    """The exit with the highest rate, or the lowest accuracy; of several, the first."""
    values = {layer: estimate["value"] for layer, estimate in _metric(run, metric).items()}
    choose = min if BY_NAME[metric].direction == "higher" else max
    return choose(values, key=lambda layer: values[layer])


def mean_of_other_exits(run: AuditRun, metric: str) -> Estimate:
    """The mean over all exits but the default one."""
    default = run.summary["default_exit"]
    return run.mean_over_layers(metric, [layer for layer in run.exit_layers if layer != default])


def _metric(run: AuditRun, metric: str) -> dict[int, JsonObject]:
    return {layer["exit_layer"]: layer["metrics"][metric] for layer in run.summary["layers"]}
