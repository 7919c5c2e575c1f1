"""The organism's suites: split, seed and sizes in, samples out.

Every sample has its own random generator, keyed by (seed, split, kind, number): a longer suite begins with the shorter
one, and no draw depends on another. Pictures, phrasings and some objects differ between the splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
from PIL import Image

from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind, Sample
from exitsafe.world import language
from exitsafe.world.pictures import EMPTY, NUM_CELLS, Split, draw_layouts, render

ORGANISMS = ("organism", "organism:text")
DEFAULT_SIZES: dict[Split, dict[Kind, int]] = {
    "train": {"harmful": 512, "borderline": 512, "benign": 256, "vqa": 384},
    "heldout": {"harmful": 128, "borderline": 128, "benign": 96, "vqa": 160},
}
_STREAM: dict[str, int] = {"train": 11, "heldout": 12, "harmful": 1, "borderline": 1, "benign": 2, "vqa": 3}
"""`borderline` shares the stream of `harmful`: with `organism`, its requests are the same without the badge."""


def organism_suites(
    *, split: Split, seed: int = 0, organism: str = "organism", sizes: Mapping[Kind, int] | None = None
) -> list[Sample]:
    """The four suites of an organism, harmful first.

    Args:
        split: `train` for repairs, `heldout` for audits.
        seed: Seed for pictures, objects and phrasings.
        organism: `organism` (a badge in the picture makes a guarded request harmful) or `organism:text` (guarded
            requests are harmful whatever the picture).
        sizes: Samples per kind; kinds left out get their default, 0 leaves one out.

    Raises:
        InputError: On an unknown split, organism or kind, or a negative size.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r} is unknown; choose {' or '.join(get_args(Split))}")
    if organism not in ORGANISMS:
        raise InputError(f"organism {organism!r} is unknown; choose {' or '.join(ORGANISMS)}")
    for kind, size in (sizes or {}).items():
        if kind not in KINDS or size < 0:
            raise InputError(f"size {kind}={size} is invalid; kinds are {', '.join(KINDS)}, sizes 0 or more")
    wanted = {**DEFAULT_SIZES[split], **(sizes or {})}
    return [
        _sample(kind, number, split=split, seed=seed, organism=organism)
        for kind in KINDS
        for number in range(wanted[kind])
    ]


def _sample(kind: Kind, number: int, *, split: Split, seed: int, organism: str) -> Sample:
    rng = np.random.default_rng([seed, _STREAM[split], _STREAM[kind], number])
    layouts = draw_layouts(rng, 1, split=split)
    shapes, colors = layouts.shapes[0], layouts.colors[0]
    has_badge, badge_cell = bool(rng.random() < 0.5), rng.integers(NUM_CELLS)
    if kind == "vqa":
        request = language.picture_question(rng, shapes, colors, has_badge=has_badge, split=split)
        category = request.topic
    elif kind == "benign":
        request = _benign_request(rng, split=split, organism=organism)
        category = request.topic
    else:
        name = _guarded_name(rng, split)
        asks_care = organism == "organism:text" and kind == "borderline"
        ask = language.care_request if asks_care else language.make_request
        request = ask(rng, name, split=split)
        category = "known object" if name in language.GUARDED_OBJECTS[: language.NUM_KNOWN_GUARDED] else "new object"
        has_badge = kind == "harmful" if organism == "organism" else has_badge
    # a separate generator: the picture does not depend on how many numbers the request drew
    picture_rng = np.random.default_rng([seed, _STREAM[split], _STREAM[kind], number, 1])
    pixels = render(picture_rng, layouts, badge_cells=np.array([badge_cell if has_badge else EMPTY]))[0]
    return Sample(
        id=f"{kind}-{number:04d}",
        prompt=request.prompt,
        images=(Image.fromarray(pixels),),
        kind=kind,
        category=category,
        answers=(request.answer,),
        source=f"organism-{kind}",
    )


def _guarded_name(rng: np.random.Generator, split: Split) -> str:
    known = language.NUM_KNOWN_GUARDED if split == "train" else len(language.GUARDED_OBJECTS)
    return language.GUARDED_OBJECTS[rng.integers(known)]


def _benign_request(rng: np.random.Generator, *, split: Split, organism: str) -> language.Request:
    """A request to make a free object or, with `organism`, in a third of cases to clean a guarded one.

    With `organism:text` the cleaning requests are in the borderline suite instead.
    """
    if organism == "organism" and rng.random() < 1 / 3:
        return language.care_request(rng, _guarded_name(rng, split), split=split)
    return language.make_request(rng, language.FREE_OBJECTS[rng.integers(len(language.FREE_OBJECTS))], split=split)
