"""Untrusted files: JSON, YAML and Parquet in, plain values out, with bounds on what they unpack to.

What cannot be read raises `UnreadableError`, whose message is a reason in a few words; callers add the file and the way
out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from exitsafe.errors import InputError

if TYPE_CHECKING:  # heavy: commands that read JSON alone do without
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAX_TEXT_BYTES = 64 * 2**20
_MAX_DEPTH = 100
_MIN_UNPACKED, _MAX_RATIO = 256 * 2**20, 256
_BYTES_PER_VALUE, _BYTES_PER_PAGE = 16, 1024  # in memory, beside the page's own content
_PADDED = re.compile(r"\s*parquet-mr(?! version (1\.2\.(9|\d\d)|1\.([3-9]|\d\d)|[2-9])\b)", re.IGNORECASE)
"""Writers whose footers count too few bytes: Arrow reads on behind their columns, where no header is checked."""


class UnreadableError(ValueError):
    """A file is missing, damaged, hostile, or not what it should be."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not a JSON object in UTF-8.
    """
    return parse_json(_read_bytes(path))


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not YAML in UTF-8; see `parse_yaml`.
    """
    try:
        return parse_yaml(_read_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8 text") from error


def parse_yaml(text: str) -> Any:
    """The value of YAML. References are refused: a few lines of them unpack to any size.

    Raises:
        UnreadableError: If it is not YAML, or nested too deeply.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UnreadableError("it refers to a value by *name; write the value out")
            is_end = isinstance(event, yaml.CollectionEndEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - is_end
            if depth > _MAX_DEPTH:
                raise UnreadableError("it is nested too deeply")
        return yaml.safe_load(text)
    except UnreadableError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # e.g. an impossible date
        raise UnreadableError(f"it is not YAML: {' '.join(str(error).split())}") from error


def read_settings(path: Path, *, example: str) -> dict[str, Any]:
    """The settings in a user's YAML file; an empty file has none.

    Raises:
        InputError: If it cannot be read, or holds something else; `example` is shown.
    """
    try:
        content = {} if (found := read_yaml(path)) is None else found
    except UnreadableError as error:
        raise InputError(f"{path} cannot be read ({error}); give a YAML file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; write e.g. {example}")
    return content


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
        size: Rows per batch, at most.

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
            wanted = {
                number: leaf
                for number, leaf in enumerate(leaves)
                if columns is None or leaf.path.split(".")[0] in columns
            }
            if missing := set(columns or ()) - set(file.schema_arrow.names):
                raise UnreadableError(f"it has no column {min(missing)!r}")
            widths = {number: _width(leaf) for number, leaf in wanted.items()}
            groups = [group for group in range(file.num_row_groups) if file.metadata.row_group(group).num_rows > 0]
            with path.open("rb") as content:
                _check_size(content, map(file.metadata.row_group, groups), widths, limit)
            if _PADDED.match(file.metadata.created_by or ""):
                raise UnreadableError("it was written by parquet-mr before 1.2.9")
        texts = [leaf.path for leaf in wanted.values() if leaf.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            names = None if columns is None else list(columns)
            for group in groups:  # one at a time: each has a dictionary of its own, and Arrow cannot join them
                yield from file.iter_batches(batch_size=size, row_groups=[group], columns=names)
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


def _width(leaf: pq.ColumnSchema) -> int:
    """Bytes that a value takes in memory; those of fixed width are never dictionary-encoded there."""
    return _BYTES_PER_VALUE + (leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0)


def _check_size(
    content: BinaryIO, groups: Iterable[pq.RowGroupMetaData], widths: Mapping[int, int], limit: int
) -> None:
    """By the headers of the pages, before any is unpacked: Arrow goes by them, and the footer may say anything.

    Args:
        content: The file.
        groups: Its footer's row groups.
        widths: Bytes per value in memory, by the column's number.
        limit: Bytes of all columns together.
    """
    size = content.seek(0, 2)
    unpacked = 0
    for group in groups:
        if group.num_columns <= max(widths, default=-1):
            raise UnreadableError("it is damaged: a row group lacks columns")
        for number, width in widths.items():
            column = group.column(number)
            # where Arrow begins to read
            start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
            end = start + column.total_compressed_size
            if not 0 <= start <= end <= size:
                raise UnreadableError("it is damaged: a column lies outside the file")
            unpacked += end - start
            for page_bytes, num_values in _pages(content, start, end):
                unpacked += page_bytes + width * num_values + _BYTES_PER_PAGE
                if unpacked > limit:
                    raise UnreadableError(
                        f"it unpacks to more than {limit // 2**20} MB, which is out of proportion to its size"
                    )


def _pages(content: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Unpacked bytes and number of values of each page, of data or a dictionary, between two places in the file.

    The fields are those of PageHeader in https://github.com/apache/parquet-format, `src/main/thrift/parquet.thrift`.
    """
    while start < end:
        content.seek(start)
        header = _thrift_struct(content)
        kinds = [found for number in (5, 7, 8) if isinstance(found := header.get(number), dict)]
        unpacked, packed, *counts = (header.get(2, -1), header.get(3, -1), *(kind.get(1, -1) for kind in kinds))
        for number in (unpacked, packed, *counts):
            if not isinstance(number, int) or not 0 <= number < 2**31:
                raise UnreadableError("it is damaged: a page has no size")
        start = content.tell() + packed
        yield unpacked, sum(counts)
    if start > end:
        raise UnreadableError("it is damaged: a page lies outside its column")


def _thrift_struct(content: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """Integers and inner structs by field number, of a struct in Thrift's compact protocol; other values are skipped.

    Whatever Arrow's reader may understand in another way is refused: numbers out of order or of too many bits, lists.
    """
    found: dict[int, Any] = {}
    field = 0
    while (kind := (byte := _byte(content)) & 15) != 0:
        before, field = field, field + (byte >> 4) if byte >> 4 else _integer(content)
        if not before < field < 2**15:
            raise UnreadableError("it is damaged: a page header is out of order")
        if kind in (4, 5, 6):
            found[field] = _integer(content)
        elif kind == 12 and depth < 4:
            found[field] = _thrift_struct(content, depth + 1)
        elif kind == 8 and (length := _varint(content)) < 2**31:
            content.seek(length, 1)
        elif kind in (3, 7):
            content.seek(1 if kind == 3 else 8, 1)
        elif kind not in (1, 2):  # true and false are kinds of their own
            raise UnreadableError("it is damaged: a page header cannot be read")
    return found


def _integer(content: BinaryIO) -> int:
    value = _varint(content)
    return (value >> 1) ^ -(value & 1)


def _varint(content: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(content)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise UnreadableError("it is damaged: a page header cannot be read")


def _byte(content: BinaryIO) -> int:
    if not (byte := content.read(1)):
        raise UnreadableError("it is truncated")
    return byte[0]


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


def without_surrogates(text: str) -> str:
    """The text with a question mark for half a surrogate pair, which Python can hold and nobody can encode."""
    return text.encode("utf-8", "replace").decode()
