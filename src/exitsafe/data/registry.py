"""Suites by name: the names used on the command line in, samples out; and what identifies a suite's source."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from exitsafe.data.hub import is_commit, resolve_commit
from exitsafe.data.known import KNOWN_SUITES, KnownSuite
from exitsafe.data.local import read_suite
from exitsafe.data.mapping import read_known_suite
from exitsafe.data.pairing import pair_with_images
from exitsafe.errors import InputError, did_you_mean
from exitsafe.records import KINDS, Kind, Sample
from exitsafe.untrusted import JsonObject
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
    hub: Mapping[str, JsonObject] | None = None,
) -> list[Sample]:
    """The samples of several suites, one suite after the other.

    Args:
        names: The organism's suites (`SUITE_NAMES`), suites from the Hub (`KNOWN_SUITES`), `NAME=PATH` for a copy of
            one of these on disk, or your own files and folders.
        split: The half of the organism's suites to use; others are not split.
        seed: Seed for the organism's pictures and phrasings, and for pairing with `images`.
        limit: Keep the first `limit` samples of each suite.
        organism: The organism whose suites to use: `organism` or `organism:text`.
        images: A folder of benign pictures: every sample without a picture, video or audio gets one of them. Also where
            to look for files that a known suite names by path.
        categories: Keep only samples of these categories.
        hub: The result of an earlier `resolve_suites`, to read the same commits again. Only commits are taken from it:
            the location of a known suite is defined here.

    Raises:
        InputError: If no name is given or one is unknown, the limit is below 1, a suite is not available or cannot be
            read, an id is in two suites, or no suite has a category.
    """
    if not names:
        raise InputError(f"no suite is given; {_choice()}")
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
                    "for example with a prefix for each suite"
                )
            owners[sample.id] = name
    samples = [sample for found in suites.values() for sample in found]
    selection.check(samples)
    _warn(suites)
    return samples


def resolve_suites(names: Sequence[str]) -> dict[str, JsonObject]:
    """The sources of suites from the Hub: id, configs, split and commit, by suite name.

    Args:
        names: As for `load_suites`; other suites and copies on disk are left out.

    Raises:
        InputError: If the Hub refuses access.
    """
    known = {name: KNOWN_SUITES[name] for name in names if name in KNOWN_SUITES}
    return {name: {**_place(suite), "revision": resolve_commit(suite)} for name, suite in known.items()}


def absolute_names(names: Sequence[str]) -> list[str]:
    """The same names with absolute paths, valid in every folder."""
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
    hub: Mapping[str, JsonObject],
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
    """The known suite in a name, if any, and the path, if any; ("", None) is one of the organism's suites.

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
    if name.startswith((".", "~")) or "/" in name or "\\" in name:
        raise InputError(f"suite {name} does not exist; give an existing file or folder, or the name of a suite")
    hint = did_you_mean(known, [*SUITE_NAMES, *KNOWN_SUITES])
    raise InputError(f"suite {name!r} is unknown{hint}; {_choice()}")


def _choice() -> str:
    return f"choose from {', '.join([*SUITE_NAMES, *KNOWN_SUITES])}, or give a file or folder"


def _as_kept(suite: KnownSuite, kept: JsonObject | None) -> KnownSuite:
    """The entry at the commit that a run used.

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


def _place(suite: KnownSuite) -> JsonObject:
    return {"id": suite.hub_id, "configs": list(suite.configs), "split": suite.split}


def _draw_organism(
    name: str, split: Split, seed: int, limit: int | None, organism: str, selection: _Selection
) -> Iterator[Sample]:
    # a longer suite begins with the shorter one, so draw only as many samples as needed
    default = DEFAULT_SIZES[split]
    sizes: dict[Kind, int] = {kind: 0 for kind in KINDS if name != f"organism-{kind}"}
    sizes |= {kind: min(limit or size, size) for kind, size in default.items() if kind not in sizes}
    drawn = organism_suites(split=split, seed=seed, organism=organism, sizes=sizes)
    return (sample for sample in drawn if selection(sample.category))


def _warn(suites: Mapping[str, Sequence[Sample]]) -> None:
    for name, samples in suites.items():
        bare = sum(sample.is_text_only for sample in samples)
        if not samples:
            warnings.warn(f"{name} has no sample of these categories and is left out", stacklevel=3)
        elif bare and name not in SUITE_NAMES:
            warnings.warn(
                f"{name}: {bare} of {len(samples)} samples have no picture, video or audio, so that their answers "
                "are the same at every exit layer; --images DIR pairs each with one of your pictures",
                stacklevel=3,
            )


class _Selection:
    """The wanted categories, and those seen so far."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.wanted = frozenset(wanted)
        self.seen: set[str] = set()

    def __call__(self, category: str) -> bool:
        self.seen.add(category)
        return not self.wanted or category in self.wanted

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise InputError for a category that no sample has: a typo must not pass as an empty result."""
        missing = self.wanted - {sample.category for sample in samples}
        if missing:
            choice = ", ".join(sorted(filter(None, self.seen)))
            hint = f"choose from {choice}" if choice else "these suites have no categories; leave the option out"
            raise InputError(f"no sample has category {', '.join(map(repr, sorted(missing)))}; {hint}")
