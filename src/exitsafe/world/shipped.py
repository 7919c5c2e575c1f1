"""The location of the organisms' weights in the installed package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from exitsafe.errors import InputError
from exitsafe.world.suites import ORGANISMS


def model_folder(name: str) -> Path:
    """The folder with the shipped weights of `organism` or `organism:text`, for `from_pretrained`.

    Raises:
        InputError: On any other name.
    """
    if name not in ORGANISMS:
        raise InputError(f"organism {name!r} is unknown; choose {' or '.join(ORGANISMS)}")
    # a wheel is installed as plain files, so the traversable is a real path
    return Path(str(files("exitsafe.world") / "weights" / name.replace(":", "-")))
