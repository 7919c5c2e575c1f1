"""CSV that any spreadsheet opens without evaluating anything: rows of text in, bytes out, and saved files back in."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from exitsafe.errors import InputError

# What a spreadsheet evaluates, full-width forms included (OWASP, "CSV injection"); the apostrophe is among them so that
# removing one at each place restores the text.
_FORMULA = re.compile("(\\A|[\r\n\t;])( *)(?=[=+\\-@\uff1d\uff0b\uff0d\uff20'])")
_NUMBER = re.compile(r"\d[\d\s.,:/eE%+-]*")


def to_csv(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> bytes:
    """Every cell quoted and texts made `neutral`, as UTF-8 with the byte-order mark that spreadsheets expect."""
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([neutral(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return lines.getvalue().encode("utf-8-sig", "replace")


def read_csv(path: Path, *, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column name, numbered as in a spreadsheet (the header is row 1); empty rows are skipped.

    Cells are returned as they are, with the apostrophes of `neutral`. Other columns are ignored.

    Raises:
        InputError: If the file is missing, not UTF-8 or not CSV, or lacks a column.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file that exitsafe label wrote") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV UTF-8") from error
    header = content.split("\n", 1)[0]
    csv.field_size_limit(2**31 - 1)  # the default is too small for a long answer
    # in some locales, spreadsheets save semicolons
    rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        missing = [name for name in columns if name not in (rows.fieldnames or ())]
        if missing:
            raise InputError(f"{path} has no column {missing[0]!r}; give a file that exitsafe label wrote")
        for number, cells in enumerate(rows, 2):
            if any(cells.values()):
                yield number, {name: cells[name] or "" for name in columns}
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as CSV ({error}); save it as CSV UTF-8") from error


def neutral(text: str) -> str:
    """A cell with an apostrophe before anything that a spreadsheet would take for a formula, number or date.

    Also inside the cell, after line breaks, tabs and semicolons, at which some spreadsheets split cells.

    >>> neutral("=1+1"), neutral("fine;-2"), neutral("3/4"), neutral("a - b")
    ("'=1+1", "fine;'-2", "'3/4", 'a - b')
    """
    marked = _FORMULA.sub(r"\1\2'", text)
    return f"'{marked}" if text[:1] in ("\t", "\r", "\n") or _NUMBER.fullmatch(text) else marked


def is_same_text(cell: str, text: str) -> bool:
    """Whether a cell still contains a text, ignoring what spreadsheets change on saving: apostrophes, whitespace and
    invisible characters."""
    return _shown(cell) == _shown(text)


def _shown(text: str) -> str:
    return "".join(mark for mark in text if mark.isprintable() and not mark.isspace() and mark != "'")
