"""All answers of several runs on one grid: finished runs in, arrays over (sample, exit layer) out.

Reads whole Parquet columns instead of records: a page holds half a million answers, each with several verdicts. Texts
stay in their column until somebody asks for those of a sample. Knows nothing about pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exitsafe.errors import RunError
from exitsafe.report.chart import LabelledRun
from exitsafe.runs import AuditRun
from exitsafe.runs.tables import SampleInfo

NONE, STOP, LENGTH = 0, 1, 2
"""Codes of `RunAnswers.finish`: no answer, and the two finish reasons."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """What one judge said of one measure.

    Args:
        judge, measure: Who, and what of.
        scores: (S, L); NaN where nothing was asked, infinity where the judge gave a reason instead of a score.
        codes: (S, L); the label's place in `labels`.
        labels: The judge's distinct labels, or its reasons where `scores` is infinite; the first is "".
    """

    judge: str
    measure: str
    scores: npt.NDArray[np.float32]
    codes: npt.NDArray[np.uint32]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunAnswers:
    """One run's answers.

    Args:
        label: The run's name in the report.
        finish: (S, L); `NONE`, `STOP` or `LENGTH`.
        tokens, chars: (S, L); lengths; 0 where there is no answer.
        rows: (S, L); the answer's place in `texts`; -1 where there is none.
        texts: All answers.
        verdicts: In the order of the run's judges.
    """

    label: str
    finish: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.uint32]
    chars: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.int64]
    texts: Any
    verdicts: tuple[Verdicts, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerGrid:
    """The answers of all runs; rows are the samples of any run, columns the exit layers of any run.

    A sample's id and digest name it: the same id that asks something else in another run is another row.
    """

    samples: tuple[SampleInfo, ...]
    exit_layers: tuple[int, ...]
    runs: tuple[RunAnswers, ...]


def read_grid(runs: Sequence[LabelledRun]) -> AnswerGrid:
    """Lay the answers of the runs out on one grid.

    Raises:
        RunError: If a run's files cannot be read, or its verdicts are of answers that it has not.
    """
    tables = [_read(run, "responses.parquet", _OF_RESPONSE) for _, run in runs]
    samples = [_samples(table) for table in tables]
    merged: dict[tuple[str, str], SampleInfo] = {}
    for info in (info for found in samples for info in found):
        merged.setdefault((info.id, info.digest), info)
    row_of = {key: row for row, key in enumerate(merged)}
    exit_layers = tuple(sorted({layer for _, run in runs for layer in run.exit_layers}))
    answers = []
    for (label, run), table, found in zip(runs, tables, samples, strict=True):
        rows = {info.id: row_of[info.id, info.digest] for info in found}
        answers.append(_answers(label, run, table, _Grid(run, rows, exit_layers, num_samples=len(merged))))
    return AnswerGrid(samples=tuple(merged.values()), exit_layers=exit_layers, runs=tuple(answers))


class _Grid:
    """Where the rows of one run's tables lie: `ids` and layers in, flat places out."""

    def __init__(self, run: AuditRun, rows: dict[str, int], exit_layers: tuple[int, ...], *, num_samples: int) -> None:
        self.run = run
        self.shape = num_samples, len(exit_layers)
        self._ids = pa.array(rows.keys(), type=pa.string())
        self._rows = np.fromiter(rows.values(), dtype=np.int64, count=len(rows))
        self._layers = pa.array(exit_layers, type=pa.int32())

    def places(self, table: Any) -> npt.NDArray[np.int64]:
        """Flat places in the grid of a table's rows."""
        ids = pc.index_in(table["sample_id"], value_set=self._ids)
        layers = pc.index_in(table["exit_layer"], value_set=self._layers)
        if ids.null_count or layers.null_count:
            raise RunError(f"{self.run.path} has verdicts of answers that it lacks; judge it again (exitsafe judge)")
        found: npt.NDArray[np.int64] = self._rows[ids.to_numpy()] * self.shape[1] + layers.to_numpy()
        return found

    def lay(self, places: npt.NDArray[np.int64], values: Any, *, dtype: Any, empty: Any = 0) -> npt.NDArray[Any]:
        """An (S, L) array with these values at these places."""
        grid = np.full(self.shape, empty, dtype=dtype)
        grid.reshape(-1)[places] = values
        return grid


def _answers(label: str, run: AuditRun, table: Any, grid: _Grid) -> RunAnswers:
    places = grid.places(table)
    texts = table["text"].combine_chunks()
    is_cut = pc.equal(table["finish_reason"], "length").to_numpy(zero_copy_only=False)
    return RunAnswers(
        label=label,
        finish=grid.lay(places, np.where(is_cut, LENGTH, STOP), dtype=np.uint8, empty=NONE),
        tokens=grid.lay(places, table["num_tokens"].to_numpy(), dtype=np.uint32),
        chars=grid.lay(places, pc.utf8_length(texts).to_numpy(zero_copy_only=False), dtype=np.uint32),
        rows=grid.lay(places, np.arange(len(texts)), dtype=np.int64, empty=-1),
        texts=texts,
        verdicts=tuple(_verdicts(run, grid)),
    )


def _verdicts(run: AuditRun, grid: _Grid) -> Iterator[Verdicts]:
    """One grid per judge and measure."""
    table = _read(run, "verdicts.parquet", _OF_VERDICT)
    places = grid.places(table)
    judges, measures = (_codes(table[name]) for name in ("judge", "measure"))
    # the reason stands in the label's place: a verdict has one or the other
    words, labels = _codes(pc.coalesce(table["unscored"], table["label"]))
    scores = pc.fill_null(table["score"], np.inf).to_numpy().astype(np.float32)
    for judge, known in run.judges:
        for measure in known:
            chosen = _is(judges, judge) & _is(measures, measure)
            own, codes = np.unique(words[chosen], return_inverse=True)
            yield Verdicts(
                judge=judge,
                measure=measure,
                scores=grid.lay(places[chosen], scores[chosen], dtype=np.float32, empty=np.nan),
                codes=grid.lay(places[chosen], codes + 1, dtype=np.uint32),
                labels=("", *(labels[word] for word in own)),
            )


def _samples(table: Any) -> list[SampleInfo]:
    """The samples in their order; each one's labels are those of its first row."""
    codes, ids = _codes(table["sample_id"])
    first = np.unique(codes, return_index=True)[1]
    rows = table.select(list(_OF_SAMPLE)).take(pa.array(first)).to_pylist()
    return [SampleInfo(id=id_, **row) for id_, row in zip(ids, rows, strict=True)]


def _codes(column: Any) -> tuple[npt.NDArray[np.int64], list[str]]:
    """A column of texts as places in the list of its distinct texts."""
    found = column.combine_chunks().dictionary_encode()
    return found.indices.to_numpy().astype(np.int64), found.dictionary.to_pylist()


def _is(coded: tuple[npt.NDArray[np.int64], list[str]], text: str) -> npt.NDArray[np.bool_]:
    codes, texts = coded
    found: npt.NDArray[np.bool_] = codes == (texts.index(text) if text in texts else -1)
    return found


_OF_SAMPLE = ("kind", "category", "source", "digest")
_OF_RESPONSE = ("sample_id", "exit_layer", *_OF_SAMPLE, "text", "num_tokens", "finish_reason")
_OF_VERDICT = ("sample_id", "exit_layer", "judge", "measure", "label", "score", "unscored")


def _read(run: AuditRun, name: str, columns: Sequence[str]) -> Any:
    try:
        return pq.read_table(run.path / name, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{run.path / name} cannot be read ({reason}); remove the run and audit again") from error
