"""Untrusted files: JSON, YAML and Parquet in, plain values out, with bounds on what they unpack to.

What cannot be read raises `UnreadableError`, whose message is a short reason; callers add the file and what to do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from exitsafe.errors import InputError

if TYPE_CHECKING:  # heavy: commands that only read JSON do not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, such as the settings of a run: text keys, and values that `json.dumps` writes."""

_MAX_TEXT_BYTES = 64 * 2**20
_MAX_DEPTH = 100
_MIN_UNPACKED, _MAX_RATIO = 256 * 2**20, 256
_BYTES_PER_VALUE, _BYTES_PER_PAGE = 16, 1024  # in memory, beside the page's own content
_PADDED = re.compile(r"\s*parquet-mr(?! version (1\.2\.(9|\d\d)|1\.([3-9]|\d\d)|[2-9])\b)", re.IGNORECASE)
"""Writers whose footers undercount bytes: Arrow then reads past their columns, where no header is checked."""


class UnreadableError(ValueError):
    """A file is missing, damaged, hostile, or not what it should be."""


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not a JSON object in UTF-8.
    """
    return parse_json(_read_bytes(path))


def read_yaml(path: Path) -> object:
    """The value in a YAML file.

    Raises:
        UnreadableError: If the file is missing, not a regular file, too large, or not YAML in UTF-8; see `parse_yaml`.
    """
    try:
        return parse_yaml(_read_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8 text") from error


def parse_yaml(text: str) -> object:
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
        value: object = yaml.safe_load(text)
        return value
    except UnreadableError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # e.g. an impossible date
        raise UnreadableError(f"it is not YAML: {' '.join(str(error).split())}") from error


def read_settings(path: Path, *, example: str) -> JsonObject:
    """The settings in a user's YAML file; an empty file has none.

    Raises:
        InputError: If it cannot be read or is not a mapping; the message shows `example`.
    """
    try:
        content = {} if (found := read_yaml(path)) is None else found
    except UnreadableError as error:
        raise InputError(f"{path} cannot be read ({error}); give a YAML file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a mapping of settings; write e.g. {example}")
    return content


def parse_json(content: bytes) -> JsonObject:
    """A JSON object whose numbers are finite and whose text can be encoded.

    >>> parse_json(b'{"a": [1.5]}')
    {'a': [1.5]}

    Raises:
        UnreadableError: If it is anything else.
    """
    try:
        value = json.loads(content, parse_constant=_refuse_constant, parse_float=_finite)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate would fail wherever it is written
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
    """A file's rows in batches; texts and bytes are dictionary-encoded, so that repeated ones are in memory once.

    Args:
        path: The file.
        columns: The columns to read; None reads all.
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
            for group in groups:  # one at a time: each has its own dictionary, and Arrow cannot join them
                yield from file.iter_batches(batch_size=size, row_groups=[group], columns=names)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableError(reason.rstrip(".")) from error


def to_python(values: pa.Array) -> list[Any]:
    """An array as Python values; equal entries of a dictionary share one object."""
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
    """Bytes that a value takes in memory; fixed-width values are never dictionary-encoded there."""
    return _BYTES_PER_VALUE + (leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0)


def _check_size(
    content: BinaryIO, groups: Iterable[pq.RowGroupMetaData], widths: Mapping[int, int], limit: int
) -> None:
    """Check the unpacked size from the page headers, which Arrow follows; the footer may claim anything.

    Args:
        content: The file.
        groups: The row groups of its footer.
        widths: Bytes per value in memory, by column number.
        limit: Most bytes for all columns together.
    """
    size = content.seek(0, 2)
    unpacked = 0
    for group in groups:
        if group.num_columns <= max(widths, default=-1):
            raise UnreadableError("it is damaged: a row group lacks columns")
        for number, width in widths.items():
            column = group.column(number)
            # where Arrow starts reading
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
    """Unpacked bytes and number of values of each data or dictionary page between two offsets.

    The field numbers are those of PageHeader in `src/main/thrift/parquet.thrift` of
    https://github.com/apache/parquet-format.
    """
    while start < end:
        content.seek(start)
        header = _thrift_struct(content)
        kinds = [found for number in (5, 7, 8) if isinstance(found := header.get(number), dict)]
        fields = (header.get(2), header.get(3), *(kind.get(1) for kind in kinds))
        numbers = [number for number in fields if isinstance(number, int) and 0 <= number < 2**31]
        if len(numbers) < len(fields):
            raise UnreadableError("it is damaged: a page has no size")
        unpacked, packed, *counts = numbers
        start = content.tell() + packed
        yield unpacked, sum(counts)
    if start > end:
        raise UnreadableError("it is damaged: a page lies outside its column")


_Struct: TypeAlias = "dict[int, int | _Struct]"
"""Integers and inner structs by field number."""


def _thrift_struct(content: BinaryIO, depth: int = 0) -> _Struct:
    """A struct in Thrift's compact protocol; values other than integers and structs are skipped.

    Whatever Arrow's reader might interpret differently is refused: lists, fields out of order, oversized numbers.
    """
    found: _Struct = {}
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
        elif kind not in (1, 2):  # true and false, which have no content
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
    raise UnreadableError(f"it contains {name}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnreadableError("it contains a number that is too large")
    return value


def without_surrogates(text: str) -> str:
    """The text with a question mark for each lone surrogate, which Python strings can hold but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
