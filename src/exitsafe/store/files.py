"""Crash-safe writing: complete files or none, and one clear line when writing fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from exitsafe.errors import RunError

PRIVATE = 0o600  # files with response text
PUBLIC = 0o644


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error, such as a full disk or a read-only folder, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); make room or choose another folder, then rerun: "
            "what was saved is kept"
        ) from error


def write_whole(path: Path, content: bytes, *, mode: int = PUBLIC) -> None:
    """Write a temporary file, flush it to disk, rename it: readers see the old file or the new one, never a part.

    The file's folder is created if it does not exist.
    """
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a leftover from a killed run may have another mode
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON document as `write_whole` does."""
    write_whole(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def refuse_link(path: Path) -> None:
    """Raise RunError for a symbolic link, through which a run from elsewhere could make us write to any file."""
    if path.is_symlink():
        raise RunError(
            f"{path} is a symbolic link, and exitsafe does not write through links: replace it by its target"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; other processes that want it get a RunError."""
    refuse_link(path)
    with writing(path):
        file = path.open("ab")
    with file:
        lock(file.fileno(), path)
        yield


def lock(descriptor: int, path: Path) -> None:
    """Lock an open file until it is closed; RunError if another process has it (not on Windows)."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path} is being written by another process; wait for it or stop it") from error


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut; not needed where folders cannot be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
