"""Files that anyone may have written: JSON, YAML and Parquet in, plain values out, with bounds on what they unpack to.

What cannot be read raises `UnreadableError`, whose message is a reason in a few words; callers add the file and the way
out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # heavy: commands that read JSON alone do without
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAX_TEXT_BYTES = 64 * 2**20
_MAX_DEPTH = 100
_MIN_UNPACKED, _MAX_RATIO = 256 * 2**20, 256
_BYTES_PER_VALUE = 16
_MAX_FIXED_WIDTH = 4096  # a value of fixed width is never dictionary-encoded in memory


class UnreadableError(ValueError):
    """A file is missing, damaged, hostile, or not what it should be."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not a JSON object in UTF-8.
    """
    return parse_json(_read_bytes(path))


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. References are refused: a few lines of them unpack to any size.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not YAML in UTF-8.
    """
    import yaml

    try:
        text = _read_bytes(path).decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UnreadableError("it refers to a value by *name; write the value out")
            is_end = isinstance(event, yaml.CollectionEndEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - is_end
            if depth > _MAX_DEPTH:
                raise UnreadableError("it is nested too deeply")
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8 text") from error
    except UnreadableError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # a date that no calendar has, say
        raise UnreadableError(f"it is not YAML: {' '.join(str(error).split())}") from error


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object whose numbers are finite and whose text can be encoded.

    >>> parse_json(b'{"a": [1.5]}')
    {'a': [1.5]}

    Raises:
        UnreadableError: If it is anything else.
    """
    try:
        value = json.loads(content, parse_constant=_refuse_constant, parse_float=_finite)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair would fail wherever it is written
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    except UnicodeError as error:
        raise UnreadableError("it is not UTF-8 text") from error
    except UnreadableError:
        raise
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableError("it is not a JSON object")
    return value


def parquet_batches(path: Path, *, columns: Sequence[str] | None = None, size: int = 256) -> Iterator[pa.RecordBatch]:
    """A file's rows in batches, texts and bytes dictionary-encoded so that repeated ones are in memory once.

    Args:
        path: The file.
        columns: Those to read; None reads all.
        size: Rows per batch.

    Raises:
        UnreadableError: If it is not a Parquet file, lacks a column, or unpacks to more than 256 times its size (and
            more than 256 MB).
        UnicodeDecodeError: If a text is not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not path.is_file():
            raise UnreadableError("it is not a regular file" if path.exists() else "it is missing")
        limit = max(_MIN_UNPACKED, _MAX_RATIO * path.stat().st_size)
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(number) for number in range(len(file.schema))]
            wanted = [leaf for leaf in leaves if columns is None or leaf.path.split(".")[0] in columns]
            if missing := set(columns or ()) - set(file.schema_arrow.names):
                raise UnreadableError(f"it has no column {min(missing)!r}")
            _check_size(file.metadata, {leaf.path for leaf in wanted}, limit)
            if any(leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MAX_FIXED_WIDTH for leaf in wanted):
                raise UnreadableError(f"it has values of more than {_MAX_FIXED_WIDTH} bytes of fixed width")
        texts = [leaf.path for leaf in wanted if leaf.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            yield from file.iter_batches(batch_size=size, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableError(reason.rstrip(".")) from error


def to_python(values: pa.Array) -> list[Any]:
    """An array as Python values; entries of one dictionary share their text or bytes."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        known = values.dictionary.to_pylist()
        return [None if code is None else known[code] for code in values.indices.to_pylist()]
    if pa.types.is_struct(kind):
        fields = {kind.field(number).name: to_python(values.field(number)) for number in range(kind.num_fields)}
        rows = zip(*fields.values(), strict=True) if fields else ((),) * len(values)
        found = [dict(zip(fields, row, strict=True)) for row in rows]
        return [value if known else None for value, known in zip(found, values.is_valid().to_pylist(), strict=True)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        offsets = values.offsets.to_pylist()
        if pa.types.is_map(kind):
            inner: list[Any] = list(zip(to_python(values.keys), to_python(values.items), strict=True))
        else:
            inner = to_python(values.values)
        spans = zip(offsets, offsets[1:], values.is_valid().to_pylist(), strict=False)
        return [inner[start:end] if known else None for start, end, known in spans]
    if pa.types.is_fixed_size_list(kind):
        size, inner = kind.list_size, to_python(values.values)
        starts = range(values.offset * size, (values.offset + len(values)) * size, size) if size else [0] * len(values)
        known_rows = values.is_valid().to_pylist()
        return [inner[at : at + size] if known else None for at, known in zip(starts, known_rows, strict=True)]
    return list(values.to_pylist())


def _check_size(metadata: pq.FileMetaData, paths: set[str], limit: int) -> None:
    """By the file's own footer, before anything is unpacked."""
    unpacked = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema in paths:
                unpacked += column.total_uncompressed_size + _BYTES_PER_VALUE * column.num_values
    if unpacked > limit:
        raise UnreadableError(f"it unpacks to more than {limit // 2**20} MB, which is out of proportion to its size")


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UnreadableError("it is not a regular file" if path.exists() else "it is missing")
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise UnreadableError(f"it is larger than {_MAX_TEXT_BYTES // 2**20} MB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror or type(error).__name__) from error


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level:
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in nested for inner in (each.values() if isinstance(each, dict) else each)]
        depth += 1
        if depth > _MAX_DEPTH:
            raise UnreadableError("it is nested too deeply")


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"it holds {name}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnreadableError("it holds a number that is too large")
    return value
