from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.untrusted import UnreadableError, parquet_batches, read_json, read_yaml, to_python

LONG = """
import resource, sys
from pathlib import Path
from exitsafe.untrusted import parquet_batches, to_python
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in parquet_batches(Path(sys.argv[1])):
    rows = [to_python(batch.column(name)) for name in batch.schema.names]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_one_long_text_in_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    """A dictionary of one text of 4 MB: 10 GB, were each row to have its own."""
    path = tmp_path / "long.parquet"
    codes = pa.array([0] * 2500, pa.int32())
    texts = pa.DictionaryArray.from_arrays(codes, ["x" * 4_000_000])
    lists = pa.ListArray.from_arrays(pa.array(range(2501), pa.int32()), texts)
    pq.write_table(pa.table({"prompt": texts, "answers": lists}), path, compression="zstd")
    assert path.stat().st_size < 20_000
    done = subprocess.run([sys.executable, "-c", LONG, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"images": [{"bytes": b"a", "path": None}, {"bytes": b"a", "path": "p"}], "n": 1, "m": [("k", "v")]},
        {"images": [], "n": None, "m": []},
        {"images": None, "n": 3, "m": None},
        {"images": [None], "n": 4, "m": [("k", None), ("l", "v")]},
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("images", pa.list_(image)), ("n", pa.int64()), ("m", pa.map_(pa.string(), pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    batches = list(parquet_batches(tmp_path / "a.parquet", size=2))
    found = [
        dict(zip(batch.schema.names, row, strict=True))
        for batch in batches
        for row in zip(*(to_python(column) for column in batch.columns), strict=True)
    ]
    assert found == rows
    assert [batch.num_rows for batch in batches] == [2, 2]


def test_a_file_of_several_row_groups_is_read_whole(tmp_path: Path) -> None:
    """As image suites are saved: each row group has its own dictionary, and a batch may not span two."""
    images = [{"bytes": bytes([number]) * 9, "path": f"{number}.png"} for number in range(10)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=4)
    batches = list(parquet_batches(tmp_path / "a.parquet", size=3))
    assert [image for batch in batches for image in to_python(batch.column("image"))] == images


def _texts(path: Path) -> None:
    with pq.ParquetWriter(path, pa.schema({"a": pa.string()}), compression="zstd", use_dictionary=False) as writer:
        for _ in range(80):
            writer.write_table(pa.table({"a": ["x" * 4_000_000]}))


def _list(path: Path) -> None:
    pq.write_table(pa.table({"a": pa.ListArray.from_arrays([0, 20_000_000], pa.nulls(20_000_000, pa.int8()))}), path)


def _fixed_width(path: Path) -> None:
    values = pa.array([bytes(4000)], pa.binary(4000))
    pq.write_table(pa.table({"a": pa.DictionaryArray.from_arrays(pa.array([0] * 80_000), values)}), path)


@pytest.mark.parametrize("make", [_texts, _list, _fixed_width])
@pytest.mark.parametrize("is_forged", [False, True])
def test_a_small_file_that_unpacks_to_much_is_refused_whatever_its_footer_says(
    tmp_path: Path, make: Callable[[Path], None], is_forged: bool
) -> None:
    path = tmp_path / "a.parquet"
    make(path)
    group = pq.ParquetFile(path).metadata.row_group(0)
    if is_forged:
        column = group.column(0)
        forge(path, {column.total_uncompressed_size, group.total_byte_size, column.num_values})
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size < 200
    assert path.stat().st_size < 100_000
    with pytest.raises(UnreadableError, match="it unpacks to more than 256 MB, which is out of proportion"):
        next(parquet_batches(path))


def forge(path: Path, numbers: set[int]) -> None:
    """Make these numbers small where the footer holds them."""
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:]
    for number in numbers - set(range(200)):  # as variable-length integers of more than one byte
        digits = [(2 * number >> shift) & 127 for shift in range(0, 2 * number.bit_length(), 7)]
        while digits[-1] == 0:
            digits.pop()
        old = bytes([digit | 128 for digit in digits[:-1]] + [digits[-1]])
        footer = footer.replace(old, b"\x94" + b"\x80" * (len(old) - 2) + b"\x00")  # 10, as long as before
    path.write_bytes(content[:start] + footer)


def test_damaged_page_headers_and_old_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x", "y"] * 50, "b": range(100)}), path)
    content = path.read_bytes()
    refused = set()
    for place in range(4, 60):
        for value in (0x00, 0x1C, 0x5C, 0x7F, 0xFF):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                list(parquet_batches(path))
            except UnreadableError as error:
                refused.add(str(error))
    assert {"it is damaged: a page has no size", "it is damaged: a page header is out of order"} <= refused

    writer = re.search(rb"parquet-cpp-arrow version [0-9.]+", content)
    assert writer is not None
    for name, is_refused in ((b"1.2.8", True), (b"1.2.9", False), (b"1.13.1", False)):
        path.write_bytes(content.replace(writer[0], (b"parquet-mr version " + name).ljust(len(writer[0]))))
        if is_refused:
            with pytest.raises(UnreadableError, match=r"written by parquet-mr before 1\.2\.9"):
                list(parquet_batches(path))
        else:
            assert sum(batch.num_rows for batch in parquet_batches(path)) == 100


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &x [1]\nb: *x\n", "it refers to a value by \\*name"),
        ("[" * 5000, "nested too deeply"),
        ("when: 2001-99-99\n", "it is not YAML"),
        ("? [a]\n: 1\n? {b: 1}\n: 2\n", "it is not YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "it is not YAML"),
    ],
)
def test_yaml_that_unpacks_or_fails_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UnreadableError, match=said) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(UnreadableError, match="it is larger than 64 MB"):
        read_json(tmp_path / "run.json")
