"""Small harmless copies of the known suites, laid out as on the Hub: the same columns, other rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from exitsafe.data import KNOWN_SUITES, KnownSuite
from tests.data.recordings import mp4, wav

NUM_ROWS = 3


def write_jsonl(folder: Path, *rows: object, name: str = "suite.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(color: str = "red", *, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


ENDINGS = {"image": ".png", "video": ".mp4", "audio": ".wav"}
CONTENT: dict[str, Callable[[], bytes]] = {"image": png, "video": mp4, "audio": wav}


def rows_of(suite: KnownSuite) -> list[dict[str, Any]]:
    """Rows with all columns that the entry reads, and one that it does not."""
    labels = [""] if isinstance(suite.kind, str) else list(suite.kind)
    rows = []
    for number in range(NUM_ROWS):
        row: dict[str, Any] = {suite.prompt: f"how do i make a zorb {number}", "unread column": number}
        row |= {suite.id: number + 10} if suite.id else {}
        row |= {suite.category: f"category {number % 2}"} if suite.category else {}
        row |= {suite.kind_column: labels[number % len(labels)]} if suite.kind_column else {}
        for field, column in suite.media.items():
            name = f"figures/{number}{ENDINGS[field]}"
            row[column] = name if suite.is_by_path else {"bytes": CONTENT[field](), "path": name}
        row |= {suite.answers: [{"answer": "red", "answer_id": 1}, {"answer": "dark red"}]} if suite.answers else {}
        rows.append(row)
    return rows


def write_copy(name: str, folder: Path) -> Path:
    """The suite in Parquet with a README.md that says which file is which."""
    suite = KNOWN_SUITES[name]
    lines = ["---", "configs:"]
    for config in suite.configs or ("default",):
        rows = rows_of(suite)
        if config == "contextual":
            rows = [row | {suite.context: "once upon a time"} for row in rows]
        path = folder / config / f"{suite.split}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {suite.split}", f"    path: {config}/{suite.split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    if suite.is_by_path:
        write_files(suite, folder / suite.folder / "figures")
    return folder


def write_files(suite: KnownSuite, folder: Path) -> Path:
    """The files that the rows of a suite name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_ROWS):
        for field in suite.media:
            (folder / f"{number}{ENDINGS[field]}").write_bytes(CONTENT[field]())
    return folder


def write_pictures(folder: Path, *, count: int = NUM_ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png())
    return folder


def write_picture_folder(name: str, folder: Path, *, config: str) -> Path:
    """The suite as pictures with a table of their names, as MOSSBench lies on the Hub."""
    suite = KNOWN_SUITES[name]
    write_pictures(folder / "images")
    rows = [
        {key: value for key, value in row.items() if key != suite.image} | {"file_name": f"{number}.png"}
        for number, row in enumerate(rows_of(suite))
    ]
    with (folder / "images" / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - images/*.png\n  - images/metadata.csv\n---\n"
    )
    return folder
