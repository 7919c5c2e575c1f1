"""What MODEL implies where flags are silent: an organism brings its suites and settings, other models bring none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.errors import InputError
from exitsafe.untrusted import UnreadableError, read_json

if TYPE_CHECKING:
    from exitsafe.records import Sample

ORGANISM_TOKENS = 24  # its longest right answer has half of that

MODEL_TOKENS = 256


def organism_of(model: str) -> str | None:
    """Which organism MODEL is: a shipped one, or a folder that `python -m exitsafe.organism` wrote; None for others."""
    from exitsafe.world import ORGANISMS

    if model in ORGANISMS:
        return model
    record = Path(model) / "check.json"
    if not record.is_file():
        return None
    try:
        name = read_json(record).get("organism")
    except UnreadableError:  # somebody else's check.json
        return None
    return name if isinstance(name, str) and name in ORGANISMS else None


def choose_suites(model: str, suites: Sequence[str] | None, *, otherwise: str) -> list[str]:
    """The suites asked for, else an organism's own.

    Raises:
        InputError: For another model, if none is asked for; `otherwise` says what to give.
    """
    if suites:
        return list(suites)
    if organism_of(model) is not None:
        from exitsafe.data import SUITE_NAMES

        return list(SUITE_NAMES)
    raise InputError(f"{model} has no suites of its own: give {otherwise}")


def read_samples(origin: dict[str, Any]) -> list[Sample]:
    """The samples that an origin describes, the same ones every time; read before a model is loaded."""
    from exitsafe.data import load_suites
    from exitsafe.world import ORGANISMS

    split, organism = origin.get("split", "heldout"), origin.get("organism", "organism")
    if split not in ("train", "heldout"):
        raise InputError(f"split {split!r} is unknown; choose heldout or train")
    if organism not in ORGANISMS:
        raise InputError(f"organism {organism!r} is unknown; choose {' or '.join(ORGANISMS)}")
    return load_suites(
        origin["suites"],
        split=split,
        seed=origin.get("seed", 0),
        limit=origin.get("limit"),
        organism=organism,
        images=origin.get("images"),
        categories=origin.get("categories"),
        hub=origin.get("hub"),
    )


def make_origin(
    model: str,
    *,
    suites: Sequence[str],
    split: str,
    seed: int,
    limit: int | None,
    images: str | Path | None = None,
    categories: Sequence[str] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is kept in run.json to draw or read the same samples again, from any folder.

    Args:
        model: MODEL.
        suites, split, seed, limit, images, categories: As for `load_suites`.
        hub: Suite commits of another run, to read the same again. Other suites are looked up.
    """
    from exitsafe.data import absolute_names, resolve_suites

    kept = {name: found for name, found in (hub or {}).items() if name in suites}
    return {
        "suites": absolute_names(suites),
        "split": split,
        "seed": seed,
        "limit": limit,
        "organism": organism_of(model) or "organism",
        "images": None if images is None else str(Path(images).absolute()),
        "categories": list(categories) if categories else None,
        "hub": kept | resolve_suites([name for name in suites if name not in kept]),
    }
