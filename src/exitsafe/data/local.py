"""A custom suite: a JSONL, CSV or Parquet file, or a folder laid out for the Hub, in; samples out.

Everything is checked before a model is loaded, and every error names the file and the row and says what to do. A row
has the fields of `Sample`: id, prompt and kind, and optionally images, videos, audios, system, category, answers and
source (the file's name by default); other columns are ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from exitsafe.data.audios import ENDINGS as AUDIO_ENDINGS
from exitsafe.data.rows import Row, read_rows
from exitsafe.data.samples import FIELDS, Keep, read_samples
from exitsafe.data.videos import ENDINGS as VIDEO_ENDINGS
from exitsafe.errors import InputError
from exitsafe.records import Sample

_MEDIA = dict.fromkeys(VIDEO_ENDINGS, "video") | dict.fromkeys(AUDIO_ENDINGS, "audio")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def load_suite(path: str | Path, *, limit: int | None = None) -> list[Sample]:
    """Read and check a suite.

    Args:
        path: A .jsonl, .csv or .parquet file, or a folder: with Parquet files, or with pictures, videos or audio and a
            metadata.jsonl, metadata.csv or metadata.parquet whose column file_name names them. Images, videos and
            audio are paths relative to that file, or encoded bytes in Parquet; a video may also be a list of frames.
            In CSV a field with several values is a JSON list. A warning lists fields that a sample does not have.
        limit: Keep the first `limit` rows; later ones are not read.

    Raises:
        InputError: If a file cannot be read or has no rows, a row is not a sample, an image, video or audio is missing,
            unreadable or outside the file's folder, or an id occurs twice.
    """
    return list(islice(read_suite(Path(path), keep=lambda category: True), limit))


def read_suite(path: Path, *, keep: Keep) -> Iterator[Sample]:
    """The samples of a file or folder one by one; see `load_suite`."""
    ids: set[str] = set()
    unread: set[str] = set()
    try:
        for file in suite_files(path):
            source = path.stem if path == file else path.resolve().name
            yield from read_samples(
                _rows(file, unread), name=str(file), folder=file.parent, source=source, ids=ids, keep=keep
            )
        if not ids:
            raise InputError(f"{path} contains no samples; write one row per sample with id, prompt and kind")
    finally:
        # also if the caller stops before the last row
        if unread:
            known = ", ".join(FIELDS)
            warnings.warn(
                f"{path}: ignored fields: {', '.join(sorted(unread))}; a sample has {known}",
                stacklevel=3,
            )


def suite_files(path: Path) -> list[Path]:
    """The files with a suite's rows: the file itself, a folder's metadata file, or its Parquet files in order.

    Raises:
        InputError: If a folder has neither.
    """
    if not path.is_dir():
        return [path]
    described = [path / name for name in _METADATA if (path / name).is_file()]
    if described:
        return described[:1]
    files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
    if not files:
        raise InputError(f"{path} has no Parquet files and no {', '.join(_METADATA)}; give a folder with one of them")
    return files


def _rows(file: Path, unread: set[str]) -> Iterator[Row]:
    """The rows of a file; columns that a sample does not have are added to `unread`."""
    for number, values in read_rows(file):
        if file.name in _METADATA and "file_name" in values:
            name = values.pop("file_name")
            values[_MEDIA.get(Path(str(name)).suffix.lower(), "image")] = name
        unread |= values.keys() - set(FIELDS)
        yield number, values
