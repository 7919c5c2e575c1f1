"""Append-only shards: records in, lines on disk that survive `kill -9`. One file per process.

A line is either one response or one judge's verdicts on a batch of responses, so that neither is ever saved in part.
Each begins with a checksum over itself and a key of the run's settings: a line that was damaged, edited, or written by
another run is ignored, and its work is redone. A line of verdicts also carries a key of the judge's settings: it counts
for that judge only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from exitsafe.errors import RunError
from exitsafe.judges import MEASURES
from exitsafe.records import Response, Verdict
from exitsafe.store.files import PRIVATE, lock, refuse_link, sync_folder, writing
from exitsafe.untrusted import JsonObject

Row = tuple[str, int]
"""A response's key: sample id and exit layer."""


@dataclass(kw_only=True)
class Saved:
    """The contents of the shards: responses by row, rows judged by judge, verdicts; `others` are unrequested judges."""

    responses: dict[Row, Response] = field(default_factory=dict)
    judged: dict[str, set[Row]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    def add_response(self, response: Response) -> None:
        self.responses.setdefault((response.sample_id, response.exit_layer), response)

    def add_judgement(self, judge: str, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """Add verdicts; rows that this judge has already judged keep their first verdicts."""
        done = self.judged.setdefault(judge, set())
        self.verdicts.extend(v for v in verdicts if (v.sample_id, v.exit_layer) not in done)
        done.update(rows)

    def drop_unanswered(self) -> None:
        """Drop verdicts on missing responses, which may differ when they are generated again."""
        if any(not rows <= self.responses.keys() for rows in self.judged.values()):
            self.judged = {judge: rows & self.responses.keys() for judge, rows in self.judged.items()}
            self.verdicts = [v for v in self.verdicts if (v.sample_id, v.exit_layer) in self.responses]


class ShardWriter:
    """Appends to one shard, under a lock that dies with the process.

    Args:
        folder: The folder of the shards; created if missing.
        process: The number of this process, the only one that writes this shard.

    Attributes:
        run_key: A key of the run's settings, part of every line's checksum.

    Raises:
        RunError: If another process is writing this shard, its name is taken by something else, or writing fails.
    """

    def __init__(self, folder: Path, *, process: int = 0, run_key: str = "") -> None:
        self.path = folder / f"{process:05d}.jsonl"
        self.run_key = run_key
        for path in (folder, self.path):
            refuse_link(path)
            if path.exists() and not (path.is_dir() if path == folder else path.is_file()):
                raise RunError(f"{path} was not written by an audit; remove it and rerun the same command")
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE)
            sync_folder(folder)
        # unbuffered: closing must not flush a half-written line again
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            lock(self._file.fileno(), self.path)
            with writing(self.path):
                self._file.truncate(_length_of_lines(self.path))  # whatever is appended next starts on its own line
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
        """Release the lock; everything appended is already on disk."""
        self._file.close()

    def append_responses(self, responses: Sequence[Response]) -> None:
        self._append([{"response": vars(response)} for response in responses])

    def append_judgement(self, judge: str, rows: Sequence[Row], verdicts: Sequence[Verdict], *, key: str = "") -> None:
        said = [vars(verdict) for verdict in verdicts]
        self._append([{"judge": judge, "key": key, "rows": rows, "verdicts": said}])

    def _append(self, records: list[JsonObject]) -> None:
        lines = b"".join(_line_of(record, self.run_key) for record in records)
        start = self._file.tell()
        with writing(self.path):
            try:
                left = memoryview(lines)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except BaseException:  # an interrupt too: whatever is appended next must start on its own line
                self._file.seek(start)
                self._file.truncate()
                raise


def read_shards(
    folder: Path, *, run_key: str = "", onto: Saved | None = None, judges: Mapping[str, str] | None = None
) -> Saved:
    """Every intact record that any process saved, added to `onto`. Warns about ignored lines.

    Args:
        folder: The folder of the shards.
        run_key: The key with which the lines were written.
        onto: What is already known.
        judges: Keys of the requested judges, by name; None takes all. Verdicts under the same name with another key
            are ignored.
    """
    saved, num_bad = onto or Saved(), 0
    for path in sorted(folder.glob("*.jsonl")):
        for line in _lines(path):
            record = _record_in(line, run_key)
            if record is None:
                num_bad += 1
            elif record.response is not None:
                saved.add_response(record.response)
            elif judges is not None and record.judge not in judges:
                saved.others.add(record.judge)
            elif judges is None or judges[record.judge] == record.key:
                saved.add_judgement(record.judge, record.rows, record.verdicts)
    saved.drop_unanswered()
    if num_bad:
        warnings.warn(
            f"{folder}: {num_bad} {'line is' if num_bad == 1 else 'lines are'} damaged or from another run; that work "
            "will be redone",
            RuntimeWarning,
            stacklevel=2,
        )
    return saved


class _Record(BaseModel):
    """A line: a response, or a judge's verdicts on some rows."""

    model_config = ConfigDict(extra="ignore", strict=True)

    response: Response | None = None
    judge: str = ""
    key: str = ""
    rows: list[Row] = []
    verdicts: list[Verdict] = []

    @property
    def is_sound(self) -> bool:
        """Whether numbers are finite and in range, and there is one verdict per row and measure."""
        if self.response is not None:
            return math.isfinite(self.response.seconds)
        places = [(verdict.sample_id, verdict.exit_layer, verdict.measure) for verdict in self.verdicts]
        return (
            bool(self.judge)
            and len(set(places)) == len(places)
            and {place[:2] for place in places} <= set(self.rows)
            and all(verdict.judge == self.judge and _is_on_scale(verdict) for verdict in self.verdicts)
        )


_OPENING = b'{"check": "%s", '
_DIGITS = 16


def _line_of(record: JsonObject, run_key: str) -> bytes:
    body = json.dumps(record, allow_nan=False).encode()[1:]
    return _OPENING % _checksum(body, run_key) + body + b"\n"


def _checksum(body: bytes, run_key: str) -> bytes:
    return hashlib.sha256(run_key.encode() + b"\n" + body).hexdigest()[:_DIGITS].encode()


def _record_in(line: bytes, run_key: str) -> _Record | None:
    """The record in a line; None if the line was altered."""
    start = len(_OPENING % bytes(_DIGITS))
    body = line[start:].rstrip(b"\n")
    if line[:start] != _OPENING % _checksum(body, run_key):
        return None
    try:
        record = _Record.model_validate_json(line)
    except ValidationError:  # forged, with a valid checksum
        return None
    return record if record.is_sound else None


def _is_on_scale(verdict: Verdict) -> bool:
    if verdict.measure not in MEASURES:
        return False
    low, high = MEASURES[verdict.measure].bounds or (-math.inf, math.inf)
    return verdict.score is None or (math.isfinite(verdict.score) and low <= verdict.score <= high)


def _lines(path: Path) -> Iterator[bytes]:
    """The complete lines; a process killed while writing leaves an unterminated one."""
    try:
        if not path.is_file() or path.is_symlink():
            raise RunError(f"{path} was not written by an audit; remove it and rerun the same command")
        with path.open("rb") as lines:
            yield from (line for line in lines if line.endswith(b"\n"))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); remove it and rerun the same command") from error


def _length_of_lines(path: Path) -> int:
    return sum(map(len, _lines(path)))
