"""Responses and verdicts as Parquet: records in, bytes out, and back. The same records give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from exitsafe.errors import RunError
from exitsafe.records import Kind, Response, Verdict


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """What a run keeps of a sample: enough to group, pair and compare, but neither prompt nor images.

    `digest` is a hash of prompt, images, kind and answers: two runs asked the same when it is the same.
    """

    id: str
    kind: Kind
    category: str
    source: str
    digest: str


_RESPONSES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("exit_layer", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
_VERDICTS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("exit_layer", pa.int32(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("unscored", pa.string()),
    ]
)


def responses_to_parquet(samples: Sequence[SampleInfo], responses: Sequence[Response]) -> bytes:
    """One row per response, with its sample's labels."""
    by_id = {sample.id: sample for sample in samples}
    columns = {name: [getattr(r, name) for r in responses] for name in _OF_RESPONSE}
    for name in _OF_SAMPLE:
        columns[name] = [getattr(by_id[response.sample_id], name) for response in responses]
    return _to_parquet(pa.table(columns, schema=_RESPONSES))


def verdicts_to_parquet(verdicts: Sequence[Verdict]) -> bytes:
    """One row per verdict."""
    columns = {name: [getattr(verdict, name) for verdict in verdicts] for name in _VERDICTS.names}
    return _to_parquet(pa.table(columns, schema=_VERDICTS))


def read_responses(path: Path) -> list[Response]:
    """The responses, in their order in the file."""
    return [Response(**row) for row in _read(path, columns=list(_OF_RESPONSE)).to_pylist()]


def read_samples(path: Path) -> list[SampleInfo]:
    """The samples behind the responses, in the run's order."""
    table = _read(path, columns=["sample_id", *_OF_SAMPLE])
    found = {row["sample_id"]: row for row in table.to_pylist()}
    return [SampleInfo(id=row.pop("sample_id"), **row) for row in found.values()]


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts, in their order in the file."""
    return [Verdict(**row) for row in _read(path, columns=list(_VERDICTS.names)).to_pylist()]


_OF_RESPONSE = ("sample_id", "exit_layer", "text", "num_tokens", "finish_reason", "seconds")
_OF_SAMPLE = ("kind", "category", "source", "digest")


def _to_parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def _read(path: Path, *, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read ({reason}); remove the run and audit again") from error
