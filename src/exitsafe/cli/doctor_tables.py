"""What `exitsafe doctor` shows to people: findings and plans in, tables out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitsafe.doctor import Plan


def facts_table(document: dict[str, Any]) -> Any:
    """What the model is."""
    from rich.table import Table

    layers, default = document["num_layers"], document["default_exit"]
    tokens, samples = document["prompt_tokens"], document["samples"]
    lines = {
        "family": f"{document['family']}, encoder {document['encoder']}",
        "exits": f"1 to {layers}; the untouched model reads {default}",
        "weights": document["dtype"] + (f", {document['quantization']}" if document["quantization"] else ""),
        "processor": "there" if document["processor"] else "missing",
        "chat template": "there" if document["chat_template"] else "missing",
        "longest prompt": f"{tokens['longest']} tokens" + ("" if tokens["measured"] else ", assumed"),
        "features": f"{readable(document['feature_bytes_per_exit'])} per prompt and exit",
        "samples": f"{samples['number']}" + ("" if samples["measured"] else ", assumed"),
        "default judge": _judge(document),
        "device": f"{document['device']['name']}, {readable(document['device']['free_bytes'])} free",
    }
    table = Table(title=f"{document['model']}: supported", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines.items():
        table.add_row(label, text)
    return table


def _judge(document: dict[str, Any]) -> str:
    if document["judge"] is None:
        return "world-rule, the organism's own"
    return f"{document['judge']}, {'available' if document['judge_problem'] is None else 'NOT AVAILABLE'}"


def memory_table(title: str, plan: Plan) -> Any:
    """One plan, part by part, and its peak."""
    from rich.table import Table

    table = Table(title=f"Memory of {title}", title_justify="left")
    for heading in ("part", "size", "when", "note"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for part in plan.device:
        table.add_row(part.name, readable(part.bytes), part.phase, part.note)
    for part in plan.host:
        table.add_row(part.name, readable(part.bytes), "main memory", part.note)
    table.add_section()
    fitting = "" if plan.rows_that_fit is None else f"; {plan.rows_that_fit} rows fit"
    fit = {True: "fits", False: "does not fit", None: ""}[plan.fits]
    table.add_row("peak", readable(plan.peak), fit, f"cache {readable(plan.cache_per_row)} a row{fitting}")
    return table


def readable(num_bytes: int) -> str:
    """Bytes as people read them.

    >>> readable(3 * 2**30)
    '3.0 GiB'
    """
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
