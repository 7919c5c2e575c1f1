"""A folder that appears complete under its name or not at all: it is filled under a temporary name and renamed."""

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
    """A temporary folder to fill, which is renamed to `out` when the context ends without an error.

    The next call removes what a killed one left behind.

    Raises:
        RunError: If `out` is not empty, another process is filling it, or writing fails.
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
        beside.rename(target)  # replaces nothing but an empty folder
        sync_folder(target.parent)


def check_empty(out: Path) -> None:
    """Raise RunError unless `out` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} already exists and is not empty: choose a new or empty folder")


def _clear(folder: Path) -> None:
    with writing(folder):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def _sync_files(folder: Path) -> None:
    """Flush the files to disk before the rename: a power cut must not leave empty files under the final name."""
    with writing(folder):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
