from __future__ import annotations

import subprocess
import sys
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
