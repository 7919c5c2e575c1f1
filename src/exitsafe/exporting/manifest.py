"""`exitsafe.json`, the manifest of a slim checkpoint: what it was made from and how, and a hash of every file.

The model card is not hashed, since people edit it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from exitsafe.errors import ModelError
from exitsafe.store.files import write_whole
from exitsafe.untrusted import JsonObject

MANIFEST, CARD = "exitsafe.json", "README.md"
ADAPTER = "adapter"
"""The folder of an adapter that is kept separate."""
FORMAT = 1


class Base(BaseModel):
    """The whole model. `checkpoint` identifies its files; None if it was not loaded from files."""

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

    `check` is the difference of the logits from those of the exit in the whole model, `sizes` and `latency` compare
    before and after, `audit` is the result of the audit.
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
    audit: JsonObject | None
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
        parts = (("changed", self.changed), ("missing", self.missing), ("not exported", self.added))
        return "; ".join(f"{title}: {', '.join(names)}" for title, names in parts if names)


def write_manifest(folder: Path, content: JsonObject) -> None:
    """Write the manifest with hashes of all files in the folder."""
    record = Manifest(**content, format=FORMAT, files=hash_each(folder))
    write_whole(folder / MANIFEST, json.dumps(record.model_dump(), indent=2, allow_nan=False).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that `export` wrote.

    Raises:
        ModelError: If it is missing or cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST}: give a folder that exitsafe export wrote")
    try:
        record = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path} cannot be read: export again") from error
    if record.format != FORMAT:
        raise ModelError(f"{path} has another version's format ({record.format}, not {FORMAT}): export again")
    return record


def file_changes(folder: Path, record: Manifest) -> FileChanges:
    """The files that are no longer as exported."""
    now = hash_each(folder)
    return FileChanges(
        changed=tuple(name for name, digest in record.files.items() if name in now and now[name] != digest),
        missing=tuple(name for name in record.files if name not in now),
        added=tuple(name for name in now if name not in record.files),
    )


def hash_each(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by path, except the card, the manifest and hidden files."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or str(name) in (MANIFEST, CARD):
            continue
        with path.open("rb") as file:
            found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
