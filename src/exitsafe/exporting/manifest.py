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
from exitsafe.exporting.parts import Parts
from exitsafe.stats import Estimate
from exitsafe.store.files import write_whole

MANIFEST, CARD = "exitsafe.json", "README.md"
ADAPTER = "adapter"
"""The folder of an adapter that is kept separate."""
FORMAT = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Base(_Record):
    """The whole model. `checkpoint` identifies its files; None if it was not loaded from files."""

    name: str
    family: str
    encoder: str
    num_layers: int
    default_exit: int
    checkpoint: str | None
    adapter: str | None
    translators: str | None


class HubSuite(_Record):
    """Where on the Hub a suite was read from."""

    id: str
    configs: tuple[str, ...] | None = None
    split: str | None = None
    revision: str | None = None


class AuditedSuite(_Record):
    """A suite of an audit; `hub` where it was read from the Hub."""

    name: str
    samples: int
    hub: HubSuite | None


class AuditedData(_Record):
    """What an audit asked."""

    hash: str
    samples: int
    suites: tuple[AuditedSuite, ...]


class AuditedJudge(_Record):
    """A judge of an audit: what it measures, what it counts in place of it (a proxy), and which model it rests on."""

    name: str
    measures: tuple[str, ...]
    proxy: dict[str, str] = {}
    model: str | None = None
    revision: str | None = None


class SuiteResult(_Record):
    """One metric of one suite, by the judge that reports it."""

    suite: str
    metric: str
    judge: str
    value: float
    low: float
    high: float
    n: int
    unscored: int


class Decoding(_Record):
    """How answers were generated."""

    model_config = ConfigDict(extra="allow", frozen=True)

    temperature: float
    max_new_tokens: int


class Audited(_Record):
    """What an audit measured at the exit: numbers, ids and names. `at_default` is of the whole model, if it differs."""

    run: str
    finished: str
    exit_layer: int
    metrics: dict[str, Estimate]
    default_exit: int
    at_default: dict[str, Estimate] | None
    data: AuditedData
    results: tuple[SuiteResult, ...]
    judges: tuple[AuditedJudge, ...]
    decoding: Decoding
    cautions: tuple[str, ...]
    stopped_early: bool
    versions: dict[str, str]


class Exported(_Record):
    """What was exported.

    `check` is how far the logits were from those of the exit in the whole model, `sizes` and `latency` say what was
    there before and after, `audit` what was measured, `parts` what must not be mixed with another export's.
    """

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
    audit: Audited | None
    versions: dict[str, str]
    parts: Parts | None = None
    to: str | None = None


class Manifest(Exported):
    """The content of exitsafe.json; `files` are the hashes of all files."""

    format: int
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


def write_manifest(folder: Path, exported: Exported) -> None:
    """Write the manifest with hashes of all files in the folder."""
    record = Manifest(**dict(exported), format=FORMAT, files=hash_each(folder))
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
