"""Rows of a known suite -> samples: maps its columns to the fields of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exitsafe.data.hub import HubRow, Values, check_columns, hub_rows
from exitsafe.data.images import path_inside
from exitsafe.data.known import KnownSuite
from exitsafe.data.rows import Row, as_integer, read_rows
from exitsafe.data.samples import Keep, is_missing, read_samples
from exitsafe.errors import InputError
from exitsafe.records import Sample


def read_known_suite(
    suite: KnownSuite, *, path: Path | None, images: Path | None, is_limited: bool, keep: Keep
) -> Iterator[Sample]:
    """The samples of a known suite one by one.

    Args:
        suite: Its entry.
        path: A copy on disk: a folder laid out as on the Hub, or a file with the same columns. None is the Hub.
        images: The folder of the files that rows name by path, if they are not in the copy.
        is_limited: Whether the caller will stop early.
        keep: Called with the category of every row.

    Raises:
        InputError: If the suite is not available or a row is not a sample.
    """
    if path is None or path.is_dir():
        found = hub_rows(suite, folder=path, is_limited=is_limited)
    else:
        found = _file_rows(suite, path)
    folders = _folders(suite, path, images)
    rows = _to_fields(suite, found, folders)
    name = f"{suite.name} ({path or suite.hub_id})"
    yield from read_samples(rows, name=name, folder=Path(), source=suite.name, ids=set(), keep=keep)


def _to_fields(suite: KnownSuite, rows: Iterator[HubRow], folders: list[Path]) -> Iterator[Row]:
    for number, (config, index, values) in enumerate(rows, 1):
        where = f"{suite.name}, row {number}"
        several = config if len(suite.configs) > 1 else ""
        own = values[suite.id] if suite.id else index
        category = values[suite.category] if suite.category else several
        yield (
            number,
            {
                "id": None if is_missing(own) else "-".join(filter(None, [suite.name, several, _as_text(own)])),
                "prompt": _prompt(suite, values),
                "kind": _kind(suite, values, where),
                "category": None if is_missing(category) else _as_text(category),
                "answers": _answers(values[suite.answers]) if suite.answers else None,
                **{
                    field: _medium(suite, field, values[column], folders, where)
                    for field, column in suite.media.items()
                },
            },
        )


def _prompt(suite: KnownSuite, values: Values) -> object:
    prompt, context = values[suite.prompt], values.get(suite.context)
    if not isinstance(prompt, str):  # missing or not text: `read_samples` reports its row
        return prompt
    return (f"{context}\n\n---\n\n" if context else "") + prompt + suite.instruction


def _kind(suite: KnownSuite, values: Values, where: str) -> str:
    if isinstance(suite.kind, str):
        return suite.kind
    label = _as_text(values[suite.kind_column])
    if label not in suite.kind:
        raise InputError(f"{where}: column {suite.kind_column!r} must be one of {', '.join(suite.kind)}")
    return suite.kind[label]


def _as_text(value: object) -> str:
    return str(as_integer(value))


def _answers(references: Any) -> list[object] | None:
    """Reference answers from texts, from records with `answer`, or, as in older tables, from a record of lists."""
    if isinstance(references, dict):
        references = references["answer"]
    if references is None:
        return None
    return [reference["answer"] if isinstance(reference, dict) else reference for reference in references]


def _medium(suite: KnownSuite, field: str, value: object, folders: list[Path], where: str) -> object:
    if value is None:
        raise InputError(f"{where}: the {field} is missing; give a copy of {suite.hub_id} that has it")
    if suite.is_by_path:
        return _find_by_path(suite, field, _as_text(value), folders, where)
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return Path(value["path"])  # where datasets saved the file
    return value


def _find_by_path(suite: KnownSuite, field: str, name: str, folders: list[Path], where: str) -> Path:
    for folder in folders:
        path = path_inside(folder, name, where=where, medium=field)
        if path.is_file():
            return path
    searched = f" from {' and '.join(map(str, folders))}" if folders else ""
    raise InputError(
        f"{where}: {field} {name} is missing{searched}; get the {field}s as {suite.page} describes and pass their "
        "folder with --images DIR"
    )


def _folders(suite: KnownSuite, path: Path | None, images: Path | None) -> list[Path]:
    copy = None if path is None else path if path.is_dir() else path.parent
    return [
        folder
        for root in (copy, images)
        if root is not None
        for folder in dict.fromkeys((root / suite.folder, root))
        if folder.is_dir()
    ]


def _file_rows(suite: KnownSuite, path: Path) -> Iterator[HubRow]:
    # as on the Hub: CONFIGURATION/SPLIT.parquet
    config = path.parent.name if path.parent.name in suite.configs else ""
    for number, values in read_rows(path):
        # each row of JSONL may have different columns
        check_columns(suite, list(values), where=f"{path}, row {number}")
        yield config, number - 1, values
