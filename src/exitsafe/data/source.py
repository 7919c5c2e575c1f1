"""Where an audit's or a training's samples come from: kept in run.json, and enough to read the same ones again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from exitsafe.data.registry import absolute_names, load_suites, resolve_suites
from exitsafe.errors import InputError
from exitsafe.records import Sample
from exitsafe.specs.inputs import Samples
from exitsafe.untrusted import JsonObject
from exitsafe.world.profile import profile_of


class SampleSource(Samples):
    """Which samples, complete.

    Args:
        split: Which half of an organism's suites.
        seed: Draws the organism's pictures and phrasings, and the pairs of `images`.
        organism: Whose suites the organism's are.
        hub: By suite of the Hub, the commit that was read.
    """

    split: Literal["train", "heldout"] = "heldout"
    seed: int = 0
    organism: Literal["organism", "organism:text"] = "organism"
    hub: Mapping[str, JsonObject] | None = None

    def read(self) -> list[Sample]:
        """The samples, the same ones every time."""
        return load_suites(self.suites, **self.model_dump(exclude={"suites"}))


def find_samples(
    model: str,
    wanted: Samples,
    *,
    split: Literal["train", "heldout"],
    seed: int,
    otherwise: str = "--suite NAME_OR_FILE",
    hub: Mapping[str, JsonObject] | None = None,
) -> SampleSource:
    """What is wanted, valid in every folder and at fixed commits; an organism brings its own suites.

    Args:
        model: The model that they are for.
        wanted: As the caller gave them.
        split, seed: As in `SampleSource`.
        otherwise: What to give if there are no suites, for the message.
        hub: Suite commits of another run, to read the same again. Other suites are looked up.

    Raises:
        InputError: If no suite is named, for a model that is not an organism.
    """
    profile = profile_of(model)
    suites = wanted.suites or (profile.suites if profile else ())
    if not suites:
        raise InputError(f"{model} has no suites of its own: give {otherwise}")
    kept = {name: found for name, found in (hub or {}).items() if name in suites}
    found = {
        "suites": absolute_names(suites),
        "images": None if wanted.images is None else wanted.images.absolute(),
        "organism": profile.name if profile else "organism",
        "hub": kept | resolve_suites([name for name in suites if name not in kept]),
    }
    return SampleSource(split=split, seed=seed, **{**wanted.model_dump(), **found})


def source_of(origin: Mapping[str, Any]) -> SampleSource:
    """The samples of a run, from its record.

    Raises:
        InputError: If the record names a split or an organism that is unknown.
    """
    return SampleSource(**{name: origin[name] for name in SampleSource.model_fields if origin.get(name) is not None})
