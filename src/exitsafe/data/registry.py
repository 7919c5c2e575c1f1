"""Suites by name: the names of the command line in, samples out. Data sets of the Hub will join the table
here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from exitsafe.data.local import load_suite
from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind, Sample
from exitsafe.world import organism_suites
from exitsafe.world.suites import DEFAULT_SIZES

SUITE_NAMES = tuple(f"organism-{kind}" for kind in KINDS)


def load_suites(
    names: Sequence[str],
    *,
    split: Literal["train", "heldout"] = "heldout",
    seed: int = 0,
    limit: int | None = None,
    organism: str = "organism",
) -> list[Sample]:
    """The samples of several suites, one suite after the other.

    Args:
        names: Known suites (`SUITE_NAMES`) or .jsonl, .csv and .parquet files.
        split: Which half of the organism's suites; files have no halves.
        seed: Draws the organism's pictures and phrasings.
        limit: Keep the first `limit` samples of each suite.
        organism: Whose suites: `organism` or `organism:text`.

    Raises:
        InputError: On no name or an unknown one, a limit below 1, a file that is no suite, or an id in
        two suites.
    """
    if not names:
        raise InputError(f"no suite is named; choose from {', '.join(SUITE_NAMES)}, or give a file")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} keeps no samples; choose 1 or more")
    owners: dict[str, str] = {}
    samples = []
    for name in names:
        for sample in _load_one(name, split=split, seed=seed, limit=limit, organism=organism):
            if sample.id in owners:
                raise InputError(
                    f"sample id {sample.id!r} is in {owners[sample.id]} and in {name}; make ids unique, "
                    "for example by a prefix per suite"
                )
            owners[sample.id] = name
            samples.append(sample)
    return samples


def _load_one(
    name: str, *, split: Literal["train", "heldout"], seed: int, limit: int | None, organism: str
) -> list[Sample]:
    if name in SUITE_NAMES:
        # a longer suite begins with the shorter one, so only what is asked for is drawn
        default = DEFAULT_SIZES[split]
        sizes: dict[Kind, int] = {kind: 0 for kind in KINDS if name != f"organism-{kind}"}
        sizes |= {kind: min(limit or size, size) for kind, size in default.items() if kind not in sizes}
        return organism_suites(split=split, seed=seed, organism=organism, sizes=sizes)
    if Path(name).suffix or Path(name).exists():
        return load_suite(name, limit=limit)
    raise InputError(f"suite {name!r} is unknown; choose from {', '.join(SUITE_NAMES)}, or give a file")
