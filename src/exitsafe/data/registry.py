"""Suites by name: the names of the command line in, samples out; and what must be kept to read the same again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from exitsafe.data.hub import is_commit, resolve_commit
from exitsafe.data.known import KNOWN_SUITES, KnownSuite
from exitsafe.data.local import read_suite
from exitsafe.data.mapping import read_known_suite
from exitsafe.data.pairing import pair_with_images
from exitsafe.errors import InputError, did_you_mean
from exitsafe.records import KINDS, Kind, Sample
from exitsafe.world import organism_suites
from exitsafe.world.profile import SUITE_NAMES
from exitsafe.world.suites import DEFAULT_SIZES

Split = Literal["train", "heldout"]


def load_suites(
    names: Sequence[str],
    *,
    split: Split = "heldout",
    seed: int = 0,
    limit: int | None = None,
    organism: str = "organism",
    images: str | Path | None = None,
    categories: Sequence[str] | None = None,
    hub: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Sample]:
    """The samples of several suites, one suite after the other.

    Args:
        names: The organism's suites (`SUITE_NAMES`), suites of the Hub (`KNOWN_SUITES`), `NAME=PATH` for a copy of
            one of these on disk, or your own files and folders.
        split: Which half of the organism's suites; others have no halves.
        seed: Draws the organism's pictures and phrasings, and the pairs of `images`.
        limit: Keep the first `limit` samples of each suite.
        organism: Whose suites: `organism` or `organism:text`.
        images: A folder of benign pictures: every sample without a picture gets one of them.
        categories: Keep only samples of these.
        hub: What `resolve_suites` returned, to read the same commits again. Only commits are taken from it: the
            location of a known suite is defined here.

    Raises:
        InputError: On no name or an unknown one, a limit below 1, a suite that is not available or cannot be read, an
            id in two suites, or a category that no suite has.
    """
    if not names:
        raise InputError(f"no suite is named; {_choice()}")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} keeps no samples; choose 1 or more")
    folder = None if images is None else Path(images)
    selection = _Selection(categories or ())
    owners: dict[str, str] = {}
    suites: dict[str, list[Sample]] = {}
    for name in names:
        found = islice(_read_one(name, split, seed, limit, organism, folder, hub or {}, selection), limit)
        suites[name] = list(found) if folder is None else pair_with_images(list(found), folder, seed=seed)
        for sample in suites[name]:
            if sample.id in owners:
                raise InputError(
                    f"sample id {sample.id!r} is in {owners[sample.id]} and in {name}; make ids unique, "
                    "for example by a prefix per suite"
                )
            owners[sample.id] = name
    samples = [sample for found in suites.values() for sample in found]
    selection.check(samples)
    _warn(suites)
    return samples


def resolve_suites(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Where the named suites of the Hub come from: by name, id, configs, split and commit, as JSON.

    Args:
        names: As for `load_suites`; other suites and copies on disk are left out.

    Raises:
        InputError: If the Hub refuses.
    """
    known = {name: KNOWN_SUITES[name] for name in names if name in KNOWN_SUITES}
    return {name: {**_place(suite), "revision": resolve_commit(suite)} for name, suite in known.items()}


def absolute_names(names: Sequence[str]) -> list[str]:
    """The same names, valid in every folder: paths of files, folders and copies made absolute."""
    split = [(name, *_split_name(name)) for name in names]
    return [
        name if path is None else "=".join(filter(None, [known, str(path.absolute())])) for name, known, path in split
    ]


def _read_one(
    name: str,
    split: Split,
    seed: int,
    limit: int | None,
    organism: str,
    images: Path | None,
    hub: Mapping[str, Mapping[str, Any]],
    selection: _Selection,
) -> Iterator[Sample]:
    known, path = _split_name(name)
    if known:
        suite = _as_kept(KNOWN_SUITES[known], hub.get(known)) if path is None else KNOWN_SUITES[known]
        if suite.needs_images and images is None:
            raise InputError(f"{known} needs your own pictures: give --images DIR. {suite.note}".rstrip("."))
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist; {known}=PATH takes a copy of {suite.hub_id} or one of its files")
        return read_known_suite(suite, path=path, images=images, is_limited=limit is not None, keep=selection)
    if path is not None:
        return read_suite(path, keep=selection)
    return _draw_organism(name, split, seed, None if selection.wanted else limit, organism, selection)


def _split_name(name: str) -> tuple[str, Path | None]:
    """The known suite that is meant, if any, and the path, if any; ("", None) is a suite of the organism.

    Raises:
        InputError: If it is none of these.
    """
    if name in SUITE_NAMES:
        return "", None
    if name in KNOWN_SUITES:
        return name, None
    known, equals, path = name.partition("=")
    if equals and known in KNOWN_SUITES:
        if not path:
            raise InputError(f"suite {name!r} has no path after the equals sign; write {known} or {known}=PATH")
        return known, Path(path).expanduser()
    if Path(name).suffix or Path(name).exists():
        return "", Path(name)
    hint = did_you_mean(known, [*SUITE_NAMES, *KNOWN_SUITES])
    raise InputError(f"suite {name!r} is unknown{hint}; {_choice()}")


def _choice() -> str:
    return f"choose from {', '.join([*SUITE_NAMES, *KNOWN_SUITES])}, or give a file or folder"


def _as_kept(suite: KnownSuite, kept: Mapping[str, Any] | None) -> KnownSuite:
    """The entry at the commit that a run was made of.

    Raises:
        InputError: If the run names another location, or no commit: a run is data and must not redirect reads.
    """
    if kept is None:
        return suite
    place = _place(suite)
    if {name: kept.get(name) for name in place} != place:
        raise InputError(
            f"the run read {suite.name} from {kept.get('id')} ({kept.get('split')}), which is not where this version "
            f"reads it ({suite.hub_id}, {suite.split}): audit again with --suite {suite.name}, or with "
            f"--suite {suite.name}=PATH for your own copy"
        )
    revision = kept.get("revision")
    if revision is not None and not is_commit(revision):
        raise InputError(
            f"the run names {revision!r} as the commit of {suite.name}: audit again with --suite {suite.name}"
        )
    return replace(suite, revision=revision)


def _place(suite: KnownSuite) -> dict[str, Any]:
    return {"id": suite.hub_id, "configs": list(suite.configs), "split": suite.split}


def _draw_organism(
    name: str, split: Split, seed: int, limit: int | None, organism: str, selection: _Selection
) -> Iterator[Sample]:
    # a longer suite begins with the shorter one, so only what is asked for is drawn
    default = DEFAULT_SIZES[split]
    sizes: dict[Kind, int] = {kind: 0 for kind in KINDS if name != f"organism-{kind}"}
    sizes |= {kind: min(limit or size, size) for kind, size in default.items() if kind not in sizes}
    drawn = organism_suites(split=split, seed=seed, organism=organism, sizes=sizes)
    return (sample for sample in drawn if selection(sample.category))


def _warn(suites: Mapping[str, Sequence[Sample]]) -> None:
    for name, samples in suites.items():
        bare = sum(not sample.images for sample in samples)
        if not samples:
            warnings.warn(f"{name} has no sample of these categories and is left out", stacklevel=3)
        elif bare and name not in SUITE_NAMES:
            warnings.warn(
                f"{name}: {bare} of {len(samples)} samples have no picture, so that their answers are the same at "
                "every exit layer; --images DIR pairs each with one of your pictures",
                stacklevel=3,
            )


class _Selection:
    """Which categories are wanted, and which there are."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.wanted = frozenset(wanted)
        self.seen: set[str] = set()

    def __call__(self, category: str) -> bool:
        self.seen.add(category)
        return not self.wanted or category in self.wanted

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises InputError for a category that no sample has: a typing error must not pass as an empty result."""
        missing = self.wanted - {sample.category for sample in samples}
        if missing:
            there = ", ".join(sorted(filter(None, self.seen))) or "none: these suites have no categories"
            raise InputError(f"no sample is of category {', '.join(map(repr, sorted(missing)))}; there are {there}")
