"""A suite in a file of the user's own: JSONL, CSV or Parquet in, samples out.

Everything is checked before a model is loaded, and every error names the file, the row and the way out. A
row has the fields of `Sample`: id, prompt and kind, and optionally images, category, answers and source
(the file's name by default); other columns are ignored.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exitsafe.data.images import check_image, path_inside
from exitsafe.data.rows import read_rows
from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind, Sample


def load_suite(path: str | Path, *, limit: int | None = None) -> list[Sample]:
    """Read and check a suite.

    Args:
        path: A .jsonl, .csv or .parquet file. Images are paths relative to it, or, in Parquet, encoded bytes. In CSV
            a field with several values is a JSON list. Fields that a sample does not have are named in a warning.
        limit: Keep the first `limit` rows; later ones are not read.

    Raises:
        InputError: On a file that cannot be read, a row that is no sample, an image that is missing, unreadable or
            outside the file's folder, an id that comes twice, or a file without rows.
    """
    path = Path(path)
    samples: dict[str, Sample] = {}
    unread: set[str] = set()
    for number, values in read_rows(path):
        if len(samples) == limit:
            break
        where = f"{path}, row {number}"
        unread |= values.keys() - _Row.model_fields.keys()
        sample = _to_sample(_parse(values, where), path=path, where=where)
        if sample.id in samples:
            raise InputError(f"{where}: id {sample.id!r} comes a second time; ids must be unique")
        samples[sample.id] = sample
    if not samples:
        raise InputError(f"{path} holds no samples; write one row per sample with id, prompt and kind")
    if unread:
        known = ", ".join(_Row.model_fields)
        warnings.warn(f"{path}: not read: {', '.join(sorted(unread))}; a sample has {known}", stacklevel=2)
    return list(samples.values())


def _as_list(value: object) -> object:
    """One value stands for a list of one; a CSV cell may hold a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:  # an ordinary text that opens with a bracket
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


class _Embedded(BaseModel):
    """An image as the Hub's Image feature stores it."""

    content: bytes | None = Field(default=None, alias="bytes")
    path: str | None = None


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    kind: Kind
    images: Annotated[list[_Embedded | bytes | str], BeforeValidator(_as_list)] = []
    image: Annotated[list[_Embedded | bytes | str], BeforeValidator(_as_list)] = []
    category: str = ""
    answers: Annotated[list[str], BeforeValidator(_as_list)] = []
    source: str = ""


def _parse(values: Mapping[str, object], where: str) -> _Row:
    given = {name: value for name, value in values.items() if value is not None and name in _Row.model_fields}
    try:
        row = _Row.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from error
    if row.images and row.image:
        raise InputError(f"{where}: both image and images are given; keep one of them")
    return row


def _explain(error: ValidationError) -> str:
    """The first fault of a row in one line."""
    fault = error.errors()[0]
    field = str(fault["loc"][0])
    if fault["type"] == "missing":
        return f"field {field!r} is missing; a sample needs id, prompt and kind"
    if field == "kind":
        return f"kind {fault['input']!r} is unknown; choose {', '.join(KINDS)}"
    if fault["type"] == "string_too_short":
        return f"field {field!r} is empty"
    return f"field {field!r} cannot be read: {fault['msg']}"


def _to_sample(row: _Row, *, path: Path, where: str) -> Sample:
    images = tuple(_find_image(image, folder=path.parent, where=where) for image in row.images or row.image)
    for image in images:
        check_image(image, where=where)
    try:
        return Sample(
            id=row.id,
            prompt=row.prompt,
            images=images,
            kind=row.kind,
            category=row.category,
            answers=tuple(row.answers),
            source=row.source or path.stem,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _find_image(image: _Embedded | bytes | str, *, folder: Path, where: str) -> Path | bytes:
    if isinstance(image, _Embedded):
        found = image.content if image.content is not None else image.path
        if found is None:
            raise InputError(f"{where}: an image has neither bytes nor path")
        image = found
    return image if isinstance(image, bytes) else path_inside(folder, image, where=where)
