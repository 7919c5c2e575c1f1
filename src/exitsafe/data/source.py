"""The source of an audit's or a training's samples: recorded in run.json, and enough to read the same ones again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from exitsafe.data.registry import absolute_names, load_suites, resolve_suites
from exitsafe.errors import InputError, did_you_mean
from exitsafe.records import Sample
from exitsafe.specs.inputs import Samples
from exitsafe.untrusted import JsonObject
from exitsafe.world.profile import profile_of
from exitsafe.world.suites import ORGANISMS


class SampleSource(Samples):
    """The complete settings that determine samples.

    Args:
        split: The half of the organism's suites to use.
        seed: Seed for the organism's pictures and phrasings, and for pairing with `images`.
        organism: The organism whose suites to use.
        hub: The sources of suites from the Hub, with the commits that were read, by suite.
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
    """The source of the wanted samples, with absolute paths and fixed commits; an organism has its own suites.

    Args:
        model: The model that the samples are for.
        wanted: The samples as the caller gave them.
        split, seed: As in `SampleSource`.
        otherwise: What to give if there are no suites, for the message.
        hub: Suite commits of another run, to read the same again. Other suites are looked up.

    Raises:
        InputError: If no suite is given and the model is not an organism.
    """
    profile = profile_of(model)
    suites = wanted.suites or (profile.suites if profile else ())
    if not suites:
        raise InputError(f"{model}{did_you_mean(model, ORGANISMS)} has no suites of its own: give {otherwise}")
    kept = {name: found for name, found in (hub or {}).items() if name in suites}
    found = {
        "suites": absolute_names(suites),
        "images": None if wanted.images is None else wanted.images.absolute(),
        "organism": profile.name if profile else "organism",
        "hub": kept | resolve_suites([name for name in suites if name not in kept]),
    }
    return SampleSource(split=split, seed=seed, **{**wanted.model_dump(), **found})


def source_of(origin: Mapping[str, Any]) -> SampleSource:
    """The source of a run's samples, from its record.

    Raises:
        InputError: If the record has an unknown split or organism.
    """
    return SampleSource(**{name: origin[name] for name in SampleSource.model_fields if origin.get(name) is not None})
