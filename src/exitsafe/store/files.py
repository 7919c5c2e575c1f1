"""Writing that survives a crash: whole files or nothing, and one clear line when the disk says no."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exitsafe.errors import RunError

PRIVATE = 0o600  # files with response text
PUBLIC = 0o644


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a locked folder into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); make room or choose another folder, "
            "then start again: what was saved is kept"
        ) from error


def write_whole(path: Path, content: bytes, *, mode: int = PUBLIC) -> None:
    """Write beside, flush to disk, rename: readers see the old file or the new one, never a part.

    The file's folder is made if need be.
    """
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a leftover of a killed run may have another mode
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document, whole."""
    write_whole(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def refuse_link(path: Path) -> None:
    """Raise RunError for a symbolic link, through which a run from elsewhere could make us write to any file."""
    if path.is_symlink():
        raise RunError(f"{path} is a symbolic link, which is not written through: replace it with what it points to")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; whoever else wants it meanwhile gets a RunError."""
    refuse_link(path)
    with writing(path):
        file = path.open("ab")
    with file:
        lock(file.fileno(), path)
        yield


def lock(descriptor: int, path: Path) -> None:
    """Lock an open file until it is closed, or say that another process has it (not on Windows)."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path} is being written by another process; wait for it or stop it") from error


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut; systems that cannot open folders need none of it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
