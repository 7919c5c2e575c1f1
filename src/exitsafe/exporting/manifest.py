"""`exitsafe.json`, which travels with a slim checkpoint: what it was made from and how, and a hash of every file.

The model card is not among the hashed files: people complete it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from exitsafe.errors import ModelError
from exitsafe.store.files import write_whole

MANIFEST, CARD = "exitsafe.json", "README.md"
ADAPTER = "adapter"
"""The folder of an adapter that was kept."""
FORMAT = 1


class Base(BaseModel):
    """The whole model. `checkpoint` identifies its files; None of a model that was not loaded from files."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    family: str
    num_layers: int
    default_exit: int
    checkpoint: str | None
    adapter: str | None
    translators: str | None


class Manifest(BaseModel):
    """The content of exitsafe.json.

    `check` is how far the logits were from those of the exit in the whole model, `sizes` and `latency` say what was
    there before and after, `audit` what was measured.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int
    exitsafe: str
    date: str
    command: str
    base: Base
    exit_layer: int
    skip_global: bool
    adapter: str | None
    dtype: str
    check: dict[str, float]
    sizes: dict[str, dict[str, int]]
    latency: dict[str, dict[str, float]]
    audit: dict[str, Any] | None
    versions: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FileChanges:
    """Files that differ from what was exported, by name."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.added)

    def __str__(self) -> str:
        said = (("changed", self.changed), ("missing", self.missing), ("not exported", self.added))
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in said if names)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the record over all files that are there by now."""
    record = Manifest(**content, format=FORMAT, files=hash_each(folder))
    write_whole(folder / MANIFEST, json.dumps(record.model_dump(), indent=2, allow_nan=False).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The record of a folder that `export` wrote.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST}: give a folder that exitsafe export wrote")
    try:
        record = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path} cannot be read: export again") from error
    if record.format != FORMAT:
        raise ModelError(f"{path} is of another version's format ({record.format}, not {FORMAT}): export again")
    return record


def file_changes(folder: Path, record: Manifest) -> FileChanges:
    """What is no longer as it was exported."""
    now = hash_each(folder)
    return FileChanges(
        changed=tuple(name for name, digest in record.files.items() if name in now and now[name] != digest),
        missing=tuple(name for name in record.files if name not in now),
        added=tuple(name for name in now if name not in record.files),
    )


def hash_each(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path; not of the card, the record, or what begins with a dot."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or str(name) in (MANIFEST, CARD):
            continue
        with path.open("rb") as file:
            found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
