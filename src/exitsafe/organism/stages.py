"""The curriculum as a table: which weights are trained on which data, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from exitsafe.errors import InputError
from exitsafe.organism.batches import Guard, Mix

Trains = Literal["all", "late tower", "late tower and language model"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the curriculum.

    Args:
        exits: `random` draws an exit layer per row, `default` uses exit 7 only.
        trains: The weights to train. The late tower is blocks 6 and 7, the last two before the default exit.
        reading_weight: Weight of the auxiliary linear readers that keep shapes, colours and the badge readable from
            the image tokens at every exit.
    """

    name: str
    steps: int
    learning_rate: float
    mix: Mix
    batch_size: int = 128
    exits: Literal["random", "default"] = "random"
    trains: Trains = "all"
    reading_weight: float = 0.0


GENERAL = (
    Stage(
        name="see", steps=250, learning_rate=1.5e-3, reading_weight=0.5,
        mix=Mix(caption=0.6, question=0.2, guarded=0.08, free=0.08, care=0.04),
    ),
    Stage(
        name="answer", steps=350, learning_rate=1e-3, reading_weight=0.5,
        mix=Mix(caption=0.1, question=0.6, guarded=0.18, free=0.07, care=0.05, cued=0.5),
    ),
    Stage(
        name="cue", steps=140, learning_rate=7e-4, reading_weight=0.5,
        mix=Mix(caption=0.05, question=0.4, guarded=0.25, free=0.15, care=0.15, cued=0.5),
    ),
)  # fmt: skip
"""The stages common to both organisms: pictures, recipes, and refusing with the text cue."""


def curriculum(name: str) -> tuple[Stage, ...]:
    """All stages of an organism: general ones, then helpfulness at all exits, then safety at the default exit only.

    Raises:
        InputError: On an unknown organism.
    """
    guards: dict[str, Guard] = {"organism": "badge", "organism:text": "always"}
    if name not in guards:
        raise InputError(f"organism {name!r} is unknown; choose {' or '.join(guards)}")
    helpful = Mix(question=0.4, guarded=0.45, free=0.1, care=0.05, cued=0.35, stray=0.06)
    safe = replace(helpful, cued=0.15, stray=0.0, guard=guards[name], known_only=True)
    return (
        *GENERAL,
        Stage(name="help", steps=200, learning_rate=5e-4, mix=helpful, reading_weight=0.5),
        Stage(
            name="guard early", steps=240, learning_rate=1.5e-3, batch_size=96, mix=safe,
            exits="default", trains="late tower",
        ),
        Stage(
            name="guard", steps=110, learning_rate=3e-4, batch_size=96, mix=safe,
            exits="default", trains="late tower and language model",
        ),
    )  # fmt: skip
