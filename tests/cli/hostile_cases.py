"""What a hostile input is; the files beside this one register theirs in `CASES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cli.hostile_place import (
    Place,
)

Make = Callable[[Place], Sequence[str | Path]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hostile input.

    Args:
        make: Breaks something and gives the command line.
        says: What the one line must name, the way out among it.
        goes_on: Whether the command gets to work before it fails: then the same one, mended, must finish.
    """

    make: Make
    says: tuple[str, ...]
    goes_on: bool = False


CASES: dict[str, Case] = {}


def case(*says: str, goes_on: bool = False) -> Callable[[Make], None]:
    def add(make: Make) -> None:
        CASES[make.__name__.strip("_").replace("_", "-")] = Case(make=make, says=says, goes_on=goes_on)

    return add
