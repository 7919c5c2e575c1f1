"""Append-only shards: records in, lines on disk that survive `kill -9`. One file per process.

A line is either one response or one judge's word on a batch of responses, so that neither is ever half
there. A torn tail is dropped when the shard is opened again, and what it held is done again. A judge's word is signed
with a key of the judge's settings: it counts for that judge only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from exitsafe.records import Response, Verdict
from exitsafe.runs.files import PRIVATE, lock, refuse_link, sync_folder, writing

Row = tuple[str, int]
"""A response's key: sample id and exit layer."""


@dataclass(kw_only=True)
class Saved:
    """What the shards hold: responses by row, rows done by judge, verdicts; `others` are judges nobody asked for."""

    responses: dict[Row, Response] = field(default_factory=dict)
    judged: dict[str, set[Row]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    def add_response(self, response: Response) -> None:
        self.responses.setdefault((response.sample_id, response.exit_layer), response)

    def add_judgement(self, judge: str, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """Rows that this judge has judged already keep their first verdicts."""
        done = self.judged.setdefault(judge, set())
        self.verdicts.extend(v for v in verdicts if (v.sample_id, v.exit_layer) not in done)
        done.update(rows)


class ShardWriter:
    """Appends to one shard, under a lock that dies with the process.

    Args:
        folder: Where the shards lie; made if missing.
        process: The number of this process; it alone writes that shard.

    Raises:
        RunError: If another process writes this shard, or the disk refuses.
    """

    def __init__(self, folder: Path, *, process: int = 0) -> None:
        self.path = folder / f"{process:05d}.jsonl"
        for place in (folder, self.path):
            refuse_link(place)
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE)
            sync_folder(folder)
        # unbuffered: nothing half-written is left to be written again on closing
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            lock(self._file.fileno(), self.path)
            with writing(self.path):
                self._file.truncate(_sound_length(self.path))
                self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock; everything appended is on disk already."""
        self._file.close()

    def append_responses(self, responses: Sequence[Response]) -> None:
        self._append([{"response": vars(response)} for response in responses])

    def append_judgement(self, judge: str, rows: Sequence[Row], verdicts: Sequence[Verdict], *, key: str = "") -> None:
        said = [vars(verdict) for verdict in verdicts]
        self._append([{"judge": judge, "key": key, "rows": rows, "verdicts": said}])

    def _append(self, records: list[dict[str, Any]]) -> None:
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        start = self._file.tell()
        with writing(self.path):
            try:
                left = memoryview(lines)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except BaseException:  # an interrupt too: what is appended next must start on a line of its own
                self._file.seek(start)
                self._file.truncate()
                raise


def read_shards(folder: Path, *, onto: Saved | None = None, judges: Mapping[str, str] | None = None) -> Saved:
    """Everything whole that any process saved, on top of what is known already.

    Args:
        folder: Where the shards lie.
        onto: What is known already.
        judges: Keys by name of the judges that count; None takes all. What a judge of the same name and another key
            said is done again.
    """
    saved = onto or Saved()
    for path in sorted(folder.glob("*.jsonl")):
        for record, _ in _sound_records(path):
            if "response" in record:
                saved.add_response(Response(**record["response"]))
            elif judges is not None and record["judge"] not in judges:
                saved.others.add(record["judge"])
            elif judges is None or judges[record["judge"]] == record["key"]:
                rows = [(sample_id, exit_layer) for sample_id, exit_layer in record["rows"]]
                verdicts = [Verdict(**verdict) for verdict in record["verdicts"]]
                saved.add_judgement(record["judge"], rows, verdicts)
    return saved


def _sound_length(path: Path) -> int:
    """The length in bytes of the part that can be trusted."""
    length = 0
    for _, length in _sound_records(path):  # noqa: B007
        pass
    return length


def _sound_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Records with the offset behind each; from the first line that is torn on, nothing is trusted."""
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            offset += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:  # a power cut can leave rubbish of any length; its rows are done again
                return
            yield record, offset
