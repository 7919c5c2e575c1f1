"""Responses and verdicts as Parquet: records in, bytes out, and back. The same records give the same bytes.

Reading checks columns, types and sizes; `integrity.py` checks that the rows are consistent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from exitsafe.errors import RunError
from exitsafe.records import Kind, Response, Verdict
from exitsafe.untrusted import UnreadableError, parquet_batches, to_python


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """What a run records of a sample: enough to group, pair and compare, but nothing of what it asks.

    `digest` is a hash of all that it asks, and of kind and answers: samples with the same digest ask the same.
    """

    id: str
    kind: Kind
    category: str
    source: str
    digest: str


_ROWS_AT_ONCE = 65536
REMEDY = "restore the run from its source, or audit again into a new folder"
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


def responses_in_table(samples: Sequence[SampleInfo], responses: Sequence[Response]) -> pa.Table:
    """One row per response, with its sample's labels."""
    by_id = {sample.id: sample for sample in samples}
    columns = {name: [getattr(r, name) for r in responses] for name in _OF_RESPONSE}
    for name in _OF_SAMPLE:
        columns[name] = [getattr(by_id[response.sample_id], name) for response in responses]
    return pa.table(columns, schema=_RESPONSES)


def verdicts_in_table(verdicts: Sequence[Verdict]) -> pa.Table:
    """One row per verdict."""
    columns = {name: [getattr(verdict, name) for verdict in verdicts] for name in _VERDICTS.names}
    return pa.table(columns, schema=_VERDICTS)


def to_parquet(table: pa.Table) -> bytes:
    """The file of a table; the same table gives the same bytes."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def read_responses(path: Path) -> list[Response]:
    """The responses, in their order in the file."""
    return [
        Response(
            sample_id=sample_id,
            exit_layer=exit_layer,
            text=text,
            num_tokens=num_tokens,
            finish_reason=finish_reason,
            seconds=seconds,
        )
        for sample_id, exit_layer, text, num_tokens, finish_reason, seconds in _rows(
            response_table(path), ("sample_id", "exit_layer", "text", "num_tokens", "finish_reason", "seconds")
        )
    ]


def read_samples(path: Path) -> list[SampleInfo]:
    """The samples of the responses, in the run's order."""
    return samples_in(response_table(path))


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts, in their order in the file."""
    return [
        Verdict(
            sample_id=sample_id,
            exit_layer=exit_layer,
            judge=judge,
            measure=measure,
            label=label,
            score=score,
            unscored=unscored,
        )
        for sample_id, exit_layer, judge, measure, label, score, unscored in _rows(verdict_table(path), _VERDICTS.names)
    ]


def samples_in(responses: pa.Table) -> list[SampleInfo]:
    """The samples in a table of responses, as their first rows describe them."""
    found: dict[str, SampleInfo] = {}
    for sample_id, *labels in _rows(responses, ("sample_id", *_OF_SAMPLE)):
        if sample_id not in found:
            found[sample_id] = SampleInfo(id=sample_id, **dict(zip(_OF_SAMPLE, labels, strict=True)))
    return list(found.values())


def response_table(path: Path) -> pa.Table:
    """`responses.parquet`: texts dictionary-encoded, with one dictionary per column.

    Raises:
        RunError: If the file is missing or damaged, or a column is missing, of another type or without a value.
    """
    return _read(path, _RESPONSES)


def verdict_table(path: Path) -> pa.Table:
    """`verdicts.parquet`, like `response_table`."""
    return _read(path, _VERDICTS)


_OF_RESPONSE = ("sample_id", "exit_layer", "text", "num_tokens", "finish_reason", "seconds")
_OF_SAMPLE = ("kind", "category", "source", "digest")


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        batches = list(parquet_batches(path, columns=schema.names, size=_ROWS_AT_ONCE))
        table = pa.Table.from_batches(batches) if batches else schema.empty_table()
        for field in schema:
            column = table.column(field.name)
            is_text = pa.types.is_dictionary(column.type) and column.type.value_type == pa.string()
            if not (is_text and field.type == pa.string()) and column.type != field.type:
                raise UnreadableError(f"its column {field.name!r} has type {column.type} instead of {field.type}")
            if column.null_count and not field.nullable:
                raise UnreadableError(f"its column {field.name!r} has rows without a value")
        return table.select(schema.names).unify_dictionaries().combine_chunks()
    except (UnreadableError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = "a text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read ({reason}); {REMEDY}") from error


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    columns = [[value for chunk in table.column(name).chunks for value in to_python(chunk)] for name in names]
    return zip(*columns, strict=True)
