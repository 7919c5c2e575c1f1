"""Files of rows: a path in, numbered rows of plain values out."""

from __future__ import annotations

import csv
import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from exitsafe.errors import InputError
from exitsafe.untrusted import UnreadableError, parquet_batches, to_python

Row = tuple[int, dict[str, object]]
_WHOLE_FLOAT = re.compile(r"-?[0-9]+\.0")
_FIRST_INEXACT = 2.0**53  # from here on, a float may represent several integers


def read_rows(path: Path) -> Iterator[Row]:
    """Rows numbered from 1: lines of JSONL, data rows of CSV and Parquet.

    Raises:
        InputError: On an unknown file extension, or a file that cannot be read as its extension says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} has an unknown file extension; suites are {', '.join(_READERS)} files")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe blocks, a device never ends
            raise InputError(f"{path} is not a regular file; give the path of one")
        yield from reader(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, csv.Error, UnreadableError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{path} cannot be read as {path.suffix[1:]}: {reason}; save it again") from error


def as_integer(value: object) -> object:
    """The integer behind a float such as 7.0, which pandas makes of integers in a column with missing values.

    >>> as_integer(7.0), as_integer(7.5), as_integer("7.0")
    (7, 7.5, '7.0')
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _FIRST_INEXACT:
        return int(value)
    return value


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter on deeply nested lists
                reason = f"this line is not JSON ({error}); write one object per line"
                raise InputError(f"{path}, row {number}: {reason}") from error
            if not isinstance(values, dict):
                raise InputError(f"{path}, row {number}: this line is not a JSON object; write one object per line")
            yield number, values


def _read_csv(path: Path) -> Iterator[Row]:
    # the default limit of 128 KiB per field is too small for a long list of prompts
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    floats = _float_columns(path)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        names = table.fieldnames or ()
        if len(set(names)) < len(names):  # the last one would win
            raise InputError(f"{path}: a column occurs twice in the header; keep one of each name")
        for number, cells in enumerate(table, 1):
            if None in cells:
                raise InputError(
                    f"{path}, row {number} has more cells than the header; quote cells that contain commas"
                )
            for name in floats:
                cells[name] = (cells[name] or "").removesuffix(".0")
            # an empty cell is a missing value
            yield number, {name: cell or None for name, cell in cells.items()}


def _float_columns(path: Path) -> set[str]:
    """Columns with only empty cells and numbers such as 7.0: integers that a table library turned into floats.

    A single such cell proves nothing, since "2.0" may be text; a whole column does. The actual read reports errors.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        table = csv.DictReader(lines)
        names = set(table.fieldnames or ())
        found: set[str] = set()
        for cells in table:
            filled = {name: cell for name in names if (cell := cells.get(name))}
            names -= {name for name, cell in filled.items() if not _WHOLE_FLOAT.fullmatch(cell)}
            found |= filled.keys()
            if not names:
                break
    return names & found


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    for batch in parquet_batches(path):
        try:
            columns = {name: to_python(batch.column(name)) for name in batch.schema.names}
        except UnicodeDecodeError:
            raise
        except (ValueError, OverflowError) as error:  # e.g. a date outside Python's range
            raise InputError(
                f"{path}: a value after row {number} cannot be represented in Python ({error}); remove its column"
            ) from error
        for row in range(batch.num_rows):
            number += 1
            yield number, {name: values[row] for name, values in columns.items()}


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
