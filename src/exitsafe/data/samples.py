"""One row of plain values in, one checked sample out."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exitsafe.data.audios import check_audio
from exitsafe.data.images import check_image, path_inside
from exitsafe.data.rows import Row, as_integer
from exitsafe.data.videos import check_video
from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind, Sample

_T = TypeVar("_T")
# control and format characters, lone surrogates, line and paragraph separators
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


Keep = Callable[[str], bool]
"""Whether samples of a category are wanted."""


def read_samples(
    rows: Iterable[Row], *, name: str, folder: Path, source: str, ids: set[str], keep: Keep
) -> Iterator[Sample]:
    """Rows with the fields of `Sample` -> samples; files of rows that are not kept are not checked.

    Args:
        rows: Numbered from 1.
        name: Name of the file or set, for errors.
        folder: The folder that the paths of images, videos and audio are relative to.
        source: The source of samples that name none.
        ids: Ids already in use; new ones are added.
        keep: Called with the category of every row.

    Raises:
        InputError: On a row that is not a sample, an image, video or audio that is missing, unreadable or outside the
            folder, or an id that occurs twice.
    """
    checked: set[Path] = set()
    for number, values in rows:
        where = f"{name}, row {number}"
        row = _parse(values, where)
        if row.id in ids:
            raise InputError(f"{where}: id {row.id!r} occurs twice; ids must be unique")
        ids.add(row.id)
        if keep(row.category):
            yield _to_sample(row, folder=folder, where=where, source=source, checked=checked)


def is_missing(value: object) -> bool:
    """Whether a value is None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _as_list(value: object) -> list[object]:
    """A single value as a list of one; a CSV cell may contain a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # ordinary text that starts with a bracket
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def _as_texts(value: object) -> list[object]:
    """Like `_as_list`, without the None or NaN that a table puts into empty cells."""
    return [as_integer(each) for each in _as_list(value) if not is_missing(each)]


def _as_id(value: object) -> object:
    value = as_integer(value)
    if isinstance(value, float) and value.is_integer():
        raise ValueError("a number this large has lost digits as a float; save the column as text")
    return value


class _Embedded(BaseModel):
    """A file as the Hub's Image, Video and Audio features store it."""

    content: bytes | None = Field(default=None, alias="bytes")
    path: str | None = None


_Text = Annotated[str, BeforeValidator(as_integer)]
# only loaders make a Path, never the text in a file
_File = _Embedded | Path | bytes | str
_Files = Annotated[list[_File], BeforeValidator(_as_list)]
_Videos = Annotated[list[_File | list[_File]], BeforeValidator(_as_list)]  # a list is a video's frames


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: Annotated[str, Field(min_length=1), BeforeValidator(_as_id)]
    prompt: str = Field(min_length=1)
    kind: Kind
    images: _Files = []
    image: _Files = []
    videos: _Videos = []
    video: _Videos = []
    audios: _Files = []
    audio: _Files = []
    system: str = ""
    category: _Text = ""
    answers: Annotated[list[str], BeforeValidator(_as_texts)] = []
    source: _Text = ""


FIELDS = tuple(_Row.model_fields)


def _parse(values: Mapping[str, object], where: str) -> _Row:
    given = {name: value for name, value in values.items() if name in FIELDS and not is_missing(value)}
    try:
        row = _Row.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from error
    for one, several in (("image", "images"), ("video", "videos"), ("audio", "audios")):
        if getattr(row, one) and getattr(row, several):
            raise InputError(f"{where}: both {one} and {several} are given; keep one of them")
    for name, text in (("id", row.id), ("category", row.category), ("source", row.source)):
        # tables print these, and a character that moves the cursor or reverses the text could falsify a table
        if any(unicodedata.category(character) in _UNPRINTABLE for character in text):
            raise InputError(f"{where}: {name} {text[:40]!a} has unprintable characters; remove them")
    return row


def _explain(error: ValidationError) -> str:
    """The first error of a row in one line."""
    fault = error.errors()[0]
    field = str(fault["loc"][0])
    if fault["type"] == "missing":
        return f"field {field!r} is missing; a sample needs id, prompt and kind"
    if field == "kind":
        # more than one word is not a misspelt kind but text from another column, which must not be printed
        is_word = isinstance(fault["input"], str) and fault["input"].isalnum() and len(fault["input"]) <= 20
        given = f"kind {fault['input']!a}" if is_word else "this kind"
        return f"{given} is unknown; choose {', '.join(KINDS)}"
    if fault["type"] == "string_too_short":
        return f"field {field!r} is empty"
    return f"field {field!r} cannot be read: {fault['msg']}"


def _to_sample(row: _Row, *, folder: Path, where: str, source: str, checked: set[Path]) -> Sample:
    def find(file: _File, medium: str) -> Path | bytes:
        return _find(file, medium, folder=folder, where=where)

    images = tuple(find(image, "image") for image in row.images or row.image)
    videos = tuple(
        tuple(find(frame, "frame") for frame in video) if isinstance(video, list) else find(video, "video")
        for video in row.videos or row.video
    )
    audios = tuple(find(audio, "audio") for audio in row.audios or row.audio)
    _check_new(images, partial(check_image, where=where), checked)
    _check_new(videos, partial(check_video, where=where), checked)
    _check_new(audios, partial(check_audio, where=where), checked)
    try:
        return Sample(
            id=row.id,
            prompt=row.prompt,
            images=images,
            kind=row.kind,
            category=row.category,
            answers=tuple(row.answers),
            source=row.source or source,
            system=row.system,
            videos=videos,
            audios=audios,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _find(file: _File, medium: str, *, folder: Path, where: str) -> Path | bytes:
    if isinstance(file, _Embedded):
        found = file.content if file.content is not None else file.path
        if found is None:
            raise InputError(f"{where}: the {medium} has neither bytes nor path; add one of them")
        file = found
    return path_inside(folder, file, where=where, medium=medium) if isinstance(file, str) else file


def _check_new(media: Iterable[_T], check: Callable[[_T], None], checked: set[Path]) -> None:
    """Check each file once, however many rows name it."""
    for medium in media:
        if not isinstance(medium, Path) or medium not in checked:
            check(medium)
        if isinstance(medium, Path):
            checked.add(medium)
