"""`exitsafe export`: a model and one of its exits -> a smaller checkpoint that stock transformers loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.cli.models import load_model
from exitsafe.specs.verbs import ExportSpec

if TYPE_CHECKING:
    from exitsafe.exporting.destinations import Destination
    from exitsafe.exporting.manifest import Manifest


def export_command(spec: ExportSpec, show: console.Show) -> None:
    """Write a checkpoint that ends its image encoder at one exit; stock transformers loads it, without exitsafe.

    Before it is moved to DIR, it is reloaded and compared with the whole model at that exit.
    """
    from exitsafe.exporting.folder import check_empty

    check_empty(spec.out)
    run = None
    if spec.audit is not None:
        from exitsafe.results.run import load_run

        run = load_run(spec.audit)
    from exitsafe.exporting.destinations import destinations
    from exitsafe.exporting.export import export
    from exitsafe.exporting.manifest import read_manifest

    vlm = load_model(spec.model, spec.loading)
    with console.progress_bar("Export", unit="step") as progress:
        folder = export(
            vlm,
            exit_layer=spec.exit_layer,
            out=spec.out,
            skip_global=spec.skip_global,
            keep_adapter=spec.keep_adapter,
            audit=run,
            to=spec.to,
            progress=progress,
        )
    record = read_manifest(folder)
    places = destinations(folder)
    lines = [*_words(record, folder, spec.audit), *map(_elsewhere, places)]
    document = {"slim": str(folder), **record.model_dump(), "destinations": [asdict(place) for place in places]}
    show(document, lambda: [_table(record), *lines])


def _table(record: Manifest) -> Any:
    from rich.table import Table

    table = Table(title=f"{record.base.name}, exit {record.exit_layer}", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = record.sizes["before"], record.sizes["after"]
    table.add_row("encoder blocks", *_cells(before["encoder_blocks"], after["encoder_blocks"], "{:.0f}"))
    if before["global_blocks"]:
        table.add_row("global blocks", *_cells(before["global_blocks"], after["global_blocks"], "{:.0f}"))
    table.add_row("parameters", *_cells(before["parameters"], after["parameters"], "{:,.0f}"))
    table.add_row("weights, MB", *_cells(before["weight_bytes"] / 1e6, after["weight_bytes"] / 1e6, "{:,.1f}"))
    slow, fast = record.latency["before"], record.latency["after"]
    table.add_row("encoder, ms", *_cells(slow["encoder_ms"], fast["encoder_ms"], "{:.1f}"))
    table.add_row("prefill with encoder, ms", *_cells(slow["prefill_ms"], fast["prefill_ms"], "{:.1f}"))
    return table


def _cells(before: float, after: float, form: str) -> list[str]:
    change = f"{100 * (after / before - 1):+.0f}%" if before else ""
    return [form.format(before), form.format(after), change]


def _words(record: Manifest, folder: Path, audit: Path | None) -> list[str]:
    largest = record.check["largest_difference"]
    lines = [
        "Before: the whole model at its default exit. Times: warm medians of a made-up picture and 32 tokens of text.",
        f"Its logits are the whole model's at this exit{f', but for {largest:.2g}' if largest else ', bit for bit'}.",
    ]
    if (before := record.sizes["before"]) == record.sizes["after"]:
        lines.append(f"Nothing is cut: exit {record.exit_layer} is the last of {before['encoder_blocks']} blocks.")
    if record.adapter == "kept":
        lines.append(f"The adapter is in {folder / 'adapter'}: without it this is the model before its repair.")
    if audit is None:
        lines.append("The model card says that no audit was given; --audit RUN puts its numbers there.")
    return [
        *lines,
        f"Checkpoint: {folder}",
        f"Check what is shipped: exitsafe verify {folder} --against {audit or 'RUN'}",
    ]


def _elsewhere(place: Destination) -> str:
    """A line for an engine: whether the checkpoint runs there and how."""
    return f"{place.engine}: {'; '.join(filter(None, (place.runs, place.command, place.note)))}"
