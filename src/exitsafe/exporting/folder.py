"""A folder that appears whole under its name, or not at all: it is filled beside its place and renamed.

Knows nothing about what is in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exitsafe.errors import RunError
from exitsafe.store.files import locked, sync_folder, writing

_LOCK = ".lock"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the name `out` when all went well.

    What a killed call left beside is removed by the next one.

    Raises:
        RunError: If `out` holds something, another process is filling it, or the disk refuses.
    """
    target = Path(out).resolve()
    check_empty(target)
    beside = target.parent / f".{target.name}.part"
    with writing(beside):
        beside.mkdir(parents=True, exist_ok=True)
    with locked(beside / _LOCK):
        _clear(beside)
        try:
            yield beside
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _sync_files(beside)
    with writing(target):
        (beside / _LOCK).unlink()
        beside.rename(target)  # over nothing, or over an empty folder
        sync_folder(target.parent)


def check_empty(out: Path) -> None:
    """Raises RunError unless `out` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} holds something already: choose a new or empty folder")


def _clear(folder: Path) -> None:
    with writing(folder):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def _sync_files(folder: Path) -> None:
    """On disk before the name is: a power cut must not leave empty files under a good name."""
    with writing(folder):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
