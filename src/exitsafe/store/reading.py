"""A finished run's folder in, its settings and scores out. `directory.py` describes the folder.

A run may be damaged or come from a stranger: hashes and verdicts are checked before anything is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from exitsafe.errors import RunError
from exitsafe.store.fingerprint import Settings
from exitsafe.store.head import FORMAT, RESULTS, check_head
from exitsafe.store.integrity import checked_scores, settings_hash
from exitsafe.store.scores import ScoreTable
from exitsafe.store.tables import REMEDY, response_table, verdict_table
from exitsafe.untrusted import JsonObject, UnreadableError, read_json

Judges = tuple[tuple[str, tuple[str, ...]], ...]
"""Names and measures, in the order of the command line."""


def read_scores(path: str | Path) -> tuple[JsonObject, ScoreTable]:
    """The content of run.json and all scores of a finished run.

    Raises:
        RunError: If the folder is missing or not a run, or its audit is not finished; if a file is missing, damaged or
            changed since the run finished, or results are missing, duplicated or out of range.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path} is not a folder; give the --out of an audit")
    head = read_head(path)
    if head["results"] is None:
        raise RunError(f"{path} is not finished; rerun its audit with the same settings to resume")
    _check_hashes(path, head)
    try:
        table = checked_scores(
            response_table(path / "responses.parquet"), verdict_table(path / "verdicts.parquet"), head["settings"]
        )
    except UnreadableError as error:
        raise RunError(f"{path}/{error}; {REMEDY}") from error
    return head, table


def is_finished(path: str | Path) -> bool:
    """Whether a folder is a finished run; reads only run.json.

    Raises:
        RunError: If run.json is not that of a run.
    """
    path = Path(path)
    return (path / "run.json").exists() and read_head(path)["results"] is not None


def judges_of(path: str | Path) -> tuple[str, ...]:
    """The names of a run's judges, finished or not.

    Raises:
        RunError: If there is no run.
    """
    return tuple(name for name, _ in names_and_measures(read_head(Path(path))["settings"]))


def origin_of(path: str | Path) -> Settings:
    """How a run was started, finished or not: model, suites and options as the caller gave them.

    Raises:
        RunError: If there is no run.
    """
    origin: Settings = read_head(Path(path))["origin"]
    return origin


def names_and_measures(settings: Settings) -> Judges:
    """The names and measures of the judges in a run's settings."""
    return tuple((judge["name"], tuple(judge["measures"])) for judge in settings.get("judges", ()))


def read_head(path: Path) -> JsonObject:
    """The content of run.json: format, settings, origin, and results, which is None until the run is finished.

    While a further judge's verdicts are being written, run.json describes the files before and after; this returns the
    description that matches verdicts.parquet, with `is_pending` set.

    Raises:
        RunError: If there is no run.json in this version's format.
    """
    file = path / "run.json"
    if not file.exists():
        raise RunError(f"{path} is not a run directory (no run.json); give the --out of an audit")
    try:
        head = read_json(file)
        if head.get("format") != FORMAT or "settings" not in head:
            if (path / "metrics.jsonl").exists():
                raise RunError(f"{path} is a training run; give the --out of an audit")
            raise RunError(f"{file} is not in this version's format ({FORMAT}); audit again into a new folder")
        check_head(head)
    except UnreadableError as error:
        raise RunError(f"{file} cannot be read ({error}); {REMEDY}") from error
    state = head.pop("next", None)
    is_pending = state is not None
    if state is not None and _hash_of(path / "verdicts.parquet") == state["results"]["files"]["verdicts.parquet"]:
        head |= state
    return {"results": None, **head, "is_pending": is_pending}


def _check_hashes(path: Path, head: JsonObject) -> None:
    results = head["results"]
    for part in ("settings", "origin"):
        if settings_hash(head[part]) != results[part]:
            raise RunError(f"{path}/run.json was changed after the run finished ({part}); {REMEDY}")
    for name in RESULTS:
        file = path / name
        if not file.is_file():
            raise RunError(f"{file} is {'not a regular file' if file.exists() else 'missing'}; {REMEDY}")
        if head["is_pending"] and name == "summary.json":  # may be the one before or after
            continue
        if _hash_of(file) != results["files"][name]:
            raise RunError(f"{file} has changed since the run finished (its hash differs); {REMEDY}")


def _hash_of(file: Path) -> str | None:
    try:
        if not file.is_file():
            return None
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror}); {REMEDY}") from error
