from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.data.rows import read_rows
from exitsafe.errors import InputError


def test_rows_are_numbered_by_line_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_empty_csv_cells_are_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "rows.CSV"
    path.write_text('a,b\n1,\n"two\nlines",3\n')
    assert list(read_rows(path)) == [(1, {"a": "1", "b": None}), (2, {"a": "two\nlines", "b": "3"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"", "unknown file extension; suites are .jsonl, .csv, .parquet files"),
        ("rows", b"", "unknown file extension"),
        ("rows.parquet", b"rubbish", "cannot be read as parquet"),
        ("rows.parquet", b"", "cannot be read as parquet"),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"rows\.jsonl, row 2: this line is not JSON"),
        ("rows.jsonl", b"\xff\xfe{", "is not UTF-8 text"),
        ("rows.csv", b"a,b\n1,2,3\n", r"rows\.csv, row 1 has more cells than the header"),
        ("rows.csv", b'a,b\n"1,2\n', "cannot be read as csv"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "a column occurs twice in the header"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv does not exist"):
        list(read_rows(tmp_path / "gone.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"is not a regular file"):
        list(read_rows(tmp_path / "folder.jsonl"))


def _repeated(path: Path, *, num_rows: int, **columns: Any) -> Path:
    """A small file with the same row again and again."""
    with pq.ParquetWriter(path, pa.schema({name: pa.array([value]).type for name, value in columns.items()})) as file:
        chunk = pa.table({name: pa.array([value] * 1000) for name, value in columns.items()})
        chunk = pa.concat_tables([chunk] * (num_rows // 1000)).combine_chunks()
        file.write_table(chunk, row_group_size=num_rows)
    return path


def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    rows = _repeated(tmp_path / "rows.parquet", num_rows=20_000_000, id=1)  # one run: some hundred bytes
    assert rows.stat().st_size < 200_000
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"rows\.parquet cannot be read as parquet: it unpacks to more than 256 MB"):
        next(iter(read_rows(rows)))
    assert pa.total_allocated_bytes() - before < 2**20
