"""Check that the results of a run are consistent: its two tables and its settings in, the scores on one grid out.

The tables may contain nothing that the settings do not name, nothing may be missing, and nothing may occur twice.
Hashes of the files detect damage and careless edits; these checks detect more careful ones. Neither stops a forger:
only repeating the run does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from exitsafe.judges import MEASURES
from exitsafe.records import KINDS
from exitsafe.store.fingerprint import Settings, canonical_json, data_fingerprint
from exitsafe.store.scores import OWN, Scores, ScoreTable
from exitsafe.store.tables import SampleInfo, samples_in
from exitsafe.untrusted import JsonObject, UnreadableError

_MOST_CELLS = 50_000_000  # samples x exits; each takes some bytes per judge and measure
Codes = npt.NDArray[np.int64]
Cells = npt.NDArray[np.int64]


def settings_hash(settings: Settings) -> str:
    """The hash by which a finished run detects that its settings, or its origin, were edited."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def checked_scores(responses: pa.Table, verdicts: pa.Table, settings: Settings) -> ScoreTable:
    """The scores of a finished run, each answered and judged exactly once.

    `stopping.stopping_of` checks whether exits that stopped early may lack answers.

    Args:
        responses, verdicts: As `response_table` and `verdict_table` read them.
        settings: The run's settings, already checked by `head.py`.

    Raises:
        UnreadableError: At the first error; the message begins with the name of the file.
    """
    samples, layers = samples_in(responses), tuple(settings["exit_layers"])
    _check_samples(samples, responses, settings)
    if len(samples) * len(layers) > _MOST_CELLS:
        raise UnreadableError(f"responses.parquet: {len(samples)} samples at {len(layers)} exits are too many to read")
    grid = _Grid(samples=samples, exit_layers=layers)
    cells = grid.cells(responses, "responses.parquet")
    is_answered = grid.once(cells, "responses.parquet: {} answers").astype(np.bool_)
    own = {
        (OWN, measure): grid.scores(cells, _numbers(responses, column, "responses.parquet"))
        for measure, column in (("tokens", "num_tokens"), ("seconds", "seconds"))
    }
    if unknown := set(_texts(responses, "finish_reason")[1]) - {"stop", "length"}:
        raise UnreadableError(f"responses.parquet: finish_reason {min(unknown)[:20]!r} is not stop or length")
    if settings["stop_when"] is None and (missing := grid.first(~is_answered)):
        raise UnreadableError(f"responses.parquet: there is no answer for {missing}")
    return ScoreTable(
        samples=tuple(samples),
        exit_layers=layers,
        scores=own | _judged(verdicts, grid, is_answered, settings["judges"]),
    )


class _Grid:
    """Samples x exit layers; a cell is row * L + column."""

    def __init__(self, *, samples: Sequence[SampleInfo], exit_layers: Sequence[int]) -> None:
        self.samples, self.exit_layers = samples, exit_layers
        self.shape = len(samples), len(exit_layers)
        self._row_of = {sample.id: row for row, sample in enumerate(samples)}

    def cells(self, table: pa.Table, file: str) -> Cells:
        """The cell of each row of a table.

        Raises:
            UnreadableError: If a sample has no answer at all, or an exit is not in the settings.
        """
        codes, ids = _texts(table, "sample_id")
        rows = np.array([self._row_of.get(each, -1) for each in ids], dtype=np.int64)
        if (used := np.unique(codes)).size and (rows[used] < 0).any():
            unknown = ids[int(used[rows[used] < 0][0])]
            raise UnreadableError(f"{file}: sample {unknown[:40]!r} is not among the answers")
        layers = _column(table.column("exit_layer")).astype(np.int64)
        order = np.asarray(self.exit_layers, dtype=np.int64)
        columns = np.searchsorted(order, layers).clip(max=len(order) - 1)
        if (wrong := order[columns] != layers).any():
            raise UnreadableError(f"{file}: exit {layers[wrong][0]} is not among the exits of run.json")
        found: Cells = rows[codes] * self.shape[1] + columns
        return found

    def once(self, cells: Cells, what: str) -> npt.NDArray[np.int64]:
        """(S, L): 1 for each cell that is present.

        Raises:
            UnreadableError: If a cell occurs twice; `what` is formatted with the count.
        """
        counts = np.bincount(cells, minlength=self.shape[0] * self.shape[1]).reshape(self.shape)
        if twice := self.first(counts > 1):
            raise UnreadableError(f"{what.format(int(counts.max()))} for {twice}; there must be one")
        return counts

    def scores(self, cells: Cells, values: npt.NDArray[np.float64]) -> Scores:
        """Values at their cells; NaN values are unscored."""
        table = Scores(values=np.full(self.shape, np.nan), unscored=np.zeros(self.shape, dtype=np.bool_))
        table.values.flat[cells] = values
        table.unscored.flat[cells] = np.isnan(values)
        return table

    def first(self, where: npt.NDArray[np.bool_]) -> str:
        """The first marked cell in words; empty if none is marked."""
        place = np.flatnonzero(where)[:1]
        if not place.size:
            return ""
        row, column = divmod(int(place[0]), self.shape[1])
        return f"sample {self.samples[row].id[:40]!r} at exit {self.exit_layers[column]}"


def _check_samples(samples: Sequence[SampleInfo], responses: pa.Table, settings: Settings) -> None:
    """Check that all rows of a sample have the same labels, and that the samples match the hash in run.json."""
    codes = np.stack([_texts(responses, name)[0] for name in ("sample_id", "kind", "category", "source", "digest")])
    if np.unique(codes, axis=1).shape[1] != len(samples):
        raise UnreadableError("responses.parquet: the rows of one sample differ in kind, category, source or digest")
    if unknown := {sample.kind for sample in samples} - set(KINDS):
        raise UnreadableError(f"responses.parquet: kind {min(unknown)[:20]!r} is unknown")
    data = settings["data"]
    if not samples or len(samples) > data["samples"]:
        raise UnreadableError(f"responses.parquet: it has {len(samples)} samples, but run.json {data['samples']}")
    if len(samples) < data["samples"] and settings["stop_when"] is not None:
        return  # if every exit stopped early, the last samples were never used
    if data_fingerprint(samples)["hash"] != data["hash"]:
        raise UnreadableError("responses.parquet: its samples are not those in run.json (their hash differs)")


def _judged(
    verdicts: pa.Table, grid: _Grid, is_answered: npt.NDArray[np.bool_], judges: Sequence[JsonObject]
) -> dict[tuple[str, str], Scores]:
    """The scores of each judge and measure, checked for completeness."""
    cells = grid.cells(verdicts, "verdicts.parquet")
    judge_codes, judge_names = _texts(verdicts, "judge")
    measure_codes, measure_names = _texts(verdicts, "measure")
    values = _numbers(verdicts, "score", "verdicts.parquet")
    has_reason, has_score = (_is_there(verdicts.column(name)) for name in ("unscored", "score"))
    if (has_reason == has_score).any():
        raise UnreadableError("verdicts.parquet: a verdict has both a score and an unscored reason, or neither")
    is_known = np.zeros(len(cells), dtype=np.bool_)
    found: dict[tuple[str, str], Scores] = {}
    for judge in judges:
        for measure in judge["measures"]:
            own = _is(judge_codes, judge_names, judge["name"]) & _is(measure_codes, measure_names, measure)
            is_known |= own
            said = f"verdicts.parquet: {{}} verdicts of {judge['name'][:60]!r} on {measure}"
            counts = grid.once(cells[own], said)
            is_owed = np.array([[each.kind in MEASURES[measure].kinds] for each in grid.samples], dtype=np.bool_)
            if missing := grid.first(is_owed & is_answered & (counts == 0)):
                raise UnreadableError(f"{said.format('no')} for {missing}; there must be one")
            if extra := grid.first((counts > 0) & ~is_answered):
                raise UnreadableError(f"{said.format(1)} for {extra}, which was not answered")
            low, high = MEASURES[measure].bounds or (-np.inf, np.inf)
            scored = values[own & has_score]
            if ((scored < low) | (scored > high)).any():
                raise UnreadableError(
                    f"verdicts.parquet: a score of {judge['name'][:60]!r} is out of range for {measure}"
                )
            if own.any():
                found[judge["name"], measure] = grid.scores(cells[own], values[own])
    if not is_known.all():
        place = int(np.flatnonzero(~is_known)[0])
        names = judge_names[judge_codes[place]][:60], measure_names[measure_codes[place]][:40]
        raise UnreadableError("verdicts.parquet: run.json has no judge {!r} that measures {!r}".format(*names))
    return found


def _texts(table: pa.Table, name: str) -> tuple[Codes, list[str]]:
    """A column of texts as codes (N,) and the texts they index."""
    column = table.column(name)
    chunks = [chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode() for chunk in column.chunks]
    if not chunks:
        return np.zeros(0, dtype=np.int64), []
    assert len(chunks) == 1, "tables are read as one chunk"
    return np.from_dlpack(chunks[0].indices).astype(np.int64), list(chunks[0].dictionary.to_pylist())


def _column(column: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """A column without nulls. pyarrow's `to_numpy` would import pandas, which takes half a second."""
    return np.from_dlpack(column.combine_chunks())


def _is_there(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return _column(column.is_valid().cast(pa.uint8())).astype(np.bool_)


def _numbers(table: pa.Table, name: str, file: str) -> npt.NDArray[np.float64]:
    """A column of finite numbers; NaN where there is no value."""
    column = table.column(name).cast(pa.float64())
    is_there, values = _is_there(column), np.full(len(column), np.nan)
    values[is_there] = _column(column.drop_null())  # `fill_null` would import pandas, too
    if not np.isfinite(values[is_there]).all() or (name != "score" and (values < 0).any()):
        raise UnreadableError(f"{file}: a value of {name} is not a number{'' if name == 'score' else ' of 0 or more'}")
    return values


def _is(codes: Codes, names: Sequence[str], wanted: str) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = np.array([name == wanted for name in names] or [False])[codes]
    return found
