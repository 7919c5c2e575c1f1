"""`exitsafe suites`: the suites that are known by name, as a table, in full or as JSON. Downloads nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.errors import InputError, did_you_mean
from exitsafe.specs.verbs import SuitesSpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.data import KnownSuite

_HINTS = (
    'Suites on the Hub need pip install "exitsafe[hub]"; to use a local copy, pass --suite NAME=PATH.',
    "exitsafe suites NAME shows an entry in full.",
)


def suites_command(spec: SuitesSpec, show: console.Show) -> None:
    """List the suites that --suite knows by name: kinds, licence, and what each needs.

    exitsafe ships none of their texts: they come from the Hub, or from a copy of yours.
    """
    from exitsafe.data import KNOWN_SUITES

    own, name = organism_entries(), spec.name
    organism_entry = next((entry for entry in own if entry["name"] == name), None)
    if name is None:
        entries = [describe(suite) for suite in KNOWN_SUITES.values()]
        show({"suites": own + entries}, lambda: [_table(own + entries), *_HINTS])
    elif organism_entry is not None:
        show(organism_entry, lambda: [_table([organism_entry])])
    elif name in KNOWN_SUITES:
        entry = describe(KNOWN_SUITES[name])
        show(entry, lambda: [_full(entry)])
    else:
        hint = did_you_mean(name, KNOWN_SUITES)
        raise InputError(f"suite {name!r} is unknown{hint}; choose from {', '.join(KNOWN_SUITES)}")


def describe(suite: KnownSuite) -> JsonObject:
    """An entry as JSON: its facts and what follows from them."""
    facts = asdict(suite)
    return {
        "name": suite.name,
        "title": suite.title,
        "kinds": list(suite.kinds),
        "samples": suite.size,
        "pictures": suite.pictures,
        "licence": suite.licence,
        "gated": suite.is_gated,
        "needs": _needs(suite),
        "note": suite.note,
        "page": suite.page,
        "citation": suite.citation,
        "source": {
            "id": suite.hub_id,
            "configs": list(suite.configs),
            "split": suite.split,
            "revision": suite.revision,
        },
        "columns": {
            field: facts[field]
            for field in ("id", "prompt", "context", "category", "kind_column", "image", "video", "audio", "answers")
            if facts[field]
        },
        "instruction": suite.instruction,
    }


def organism_entries() -> list[JsonObject]:
    """The organism's own suites, as far as they have the same facts."""
    from exitsafe.data import SUITE_NAMES
    from exitsafe.world.suites import DEFAULT_SIZES

    return [
        {
            "name": name,
            "kinds": [kind],
            "samples": size,
            "pictures": "drawn",
            "licence": "Apache-2.0",
            "gated": False,
            "needs": [],
        }
        for name, (kind, size) in zip(SUITE_NAMES, DEFAULT_SIZES["heldout"].items(), strict=True)
    ]


def _needs(suite: KnownSuite) -> list[str]:
    needs = []
    if suite.is_gated:
        needs.append("hf auth login")
    if suite.needs_images or suite.is_by_path:
        needs.append("--images DIR")
    if suite.is_large:
        needs.append("--limit N")
    return needs


def _table(entries: list[JsonObject]) -> Any:
    from rich.table import Table

    table = Table(title="Suites known by name", title_justify="left")
    for heading in ("suite", "kinds", "samples", "pictures", "licence", "gated", "needs"):
        table.add_column(heading, justify="right" if heading == "samples" else "left", no_wrap=heading == "suite")
    for entry in entries:
        table.add_row(
            entry["name"],
            ", ".join(entry["kinds"]),
            str(entry["samples"]),
            entry["pictures"],
            entry["licence"],
            "yes" if entry["gated"] else "",
            ", ".join(entry["needs"]),
        )
    return table


def _full(entry: JsonObject) -> Any:
    from rich.table import Table

    source, revision = entry["source"], entry["source"]["revision"]
    lines = {
        "set": entry["title"],
        "citation": entry["citation"],
        "page": entry["page"],
        "licence": entry["licence"] + (", gated" if entry["gated"] else ""),
        "samples": f"{entry['samples']}, {' and '.join(entry['kinds'])}",
        "pictures": entry["pictures"],
        "needs": ", ".join(entry["needs"]) or "nothing more",
        "source": " ".join(filter(None, [source["id"], ", ".join(source["configs"]), source["split"]])),
        "revision": revision or "the newest; its commit is kept with the run",
        "columns": ", ".join(f"{field}: {column}" for field, column in entry["columns"].items()),
        "after the prompt": entry["instruction"].strip(),
        "note": entry["note"],
    }
    table = Table(title=entry["name"], title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines.items():
        if text:
            table.add_row(label, text)
    return table
