"""The run directory being written: settings, what is done so far, and finally the compacted result.

    run.json             settings with all hashes; written first, and again at the end with the hashes of the results,
                         which mark a run as finished
    shards/00000.jsonl   responses and verdicts as they arrive; deleted when the run is finished
    responses.parquet    one row per sample and exit layer
    verdicts.parquet     one row per judge, measure, sample and exit layer
    summary.json         every metric

Files with response text are readable by their owner only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from exitsafe.errors import InputError, RunError
from exitsafe.records import Response, Verdict
from exitsafe.store.files import PRIVATE, PUBLIC, write_whole, writing
from exitsafe.store.fingerprint import Settings, canonical_json, differences
from exitsafe.store.head import FORMAT, check_head
from exitsafe.store.integrity import checked_scores, settings_hash
from exitsafe.store.reading import is_finished, names_and_measures, read_head, read_scores
from exitsafe.store.scores import ScoreTable
from exitsafe.store.shards import Row, Saved, ShardWriter, read_shards
from exitsafe.store.tables import (
    SampleInfo,
    read_responses,
    read_verdicts,
    responses_in_table,
    to_parquet,
    verdicts_in_table,
)
from exitsafe.untrusted import JsonObject, UnreadableError

Summarise = Callable[[ScoreTable, Settings], Mapping[str, object]]
"""Scores and settings -> the content of summary.json; raises UnreadableError if an exit lacks answers."""


class RunDirectory:
    """A run being written: new, resumed, or extended by further judges.

    Several processes may write one run, each its own shard: the first (process 0) creates it before the others open it.

    Args:
        path: A new or empty folder, or a run with the same settings.
        summarise: Makes the content of summary.json from all scores and the settings.
        settings: A JSON object; any difference from the run on disk is refused, except for further judges.
        origin: A JSON object that is recorded but not compared; it overrides the record of an earlier start.
        process: The number of this process.
        retried: Judges of a finished run whose unscored answers are judged again.

    Attributes:
        settings: As given; `judges` are the run's own, then the new ones.
        saved: What is done so far.
        is_finished: Whether nothing is left to do.

    Raises:
        RunError: If the folder contains something else, a run with other settings or a finished run that was damaged or
            edited, if another process is writing it, or if writing fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        summarise: Summarise,
        settings: Settings,
        origin: Settings | None = None,
        process: int = 0,
        retried: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self._summarise = summarise
        self.settings: Settings = json.loads(canonical_json(settings))
        self.saved = Saved()
        self._retried = frozenset(retried)
        self._head: JsonObject = {
            "format": FORMAT,
            "settings": self.settings,
            "origin": json.loads(json.dumps(origin or {})),  # as it will be read back
        }
        self._shards: ShardWriter | None = None
        _check_writable(self._head)
        check_folder(self.path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        has_head = (self.path / "run.json").exists()
        if process > 0 and not has_head:
            raise RunError(f"{self.path} has no run.json from the first process; use a disk that all processes share")
        self._run_key = _run_key(self.settings)
        if has_head:
            before = read_head(self.path)
            self._run_key = _run_key(before["settings"])
            self._head["origin"] = {**before["origin"], **self._head["origin"]}
        self._was_finished = is_finished(self.path)
        if self._was_finished:
            read_scores(self.path)  # refuse edited results before building on them or renewing their hashes
            self._adopt_judges()
            stored = read_head(self.path)
            is_whole = self.settings == stored["settings"] and not stored["is_pending"]
            self.is_finished = is_whole and not self._retried
        else:
            self.is_finished = False
        if self.is_finished:
            if process == 0 and (self.path / "shards").exists():
                self._shards = self._open_shard(process)  # unless another judge is being added
                self.reload()
                self._drop_shards()
            return
        self._shards = self._open_shard(process)  # from here on the run is locked
        try:
            self.reload()
            # the other processes, whose model or libraries may differ, compare with what the first has just written
            if (self.saved.responses or process > 0) and not self._was_finished:
                self._adopt_judges()
            if process == 0 and not self._was_finished:
                # settings may still change after a start that failed before the first answer
                write_whole(self.path / "run.json", _to_json(self._head))
            self._run_key = self._shards.run_key = _run_key(self.settings)
        except BaseException:
            self._shards.close()
            raise

    def _open_shard(self, process: int) -> ShardWriter:
        return ShardWriter(self.path / "shards", process=process, run_key=self._run_key)

    def reload(self) -> None:
        """Reread what all processes have saved so far."""
        saved = Saved()
        if self._was_finished:
            for response in read_responses(self.path / "responses.parquet"):
                saved.add_response(response)
            verdicts = read_verdicts(self.path / "verdicts.parquet")
            for judge, _ in names_and_measures(read_head(self.path)["settings"]):
                own = [verdict for verdict in verdicts if verdict.judge == judge]
                again = {(v.sample_id, v.exit_layer) for v in own if v.unscored and judge in self._retried}
                own = [verdict for verdict in own if (verdict.sample_id, verdict.exit_layer) not in again]
                saved.add_judgement(judge, [row for row in saved.responses if row not in again], own)
        self.saved = read_shards(self.path / "shards", run_key=self._run_key, onto=saved, judges=_keys(self.settings))

    def _adopt_judges(self) -> None:
        """Take the settings of the run on disk and append new judges; any other difference is refused."""
        head = read_head(self.path)
        own = list(head["settings"]["judges"])
        names = {judge["name"] for judge in own}
        judges = own + [judge for judge in self.settings["judges"] if judge["name"] not in names]
        _check_same(self.path, head["settings"], self.settings, judges, is_finished=self._was_finished)
        self.settings = {**head["settings"], "judges": judges}
        self._head = {**self._head, "settings": self.settings}

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's shard; everything saved is already on disk."""
        if self._shards is not None:
            self._shards.close()
            self._shards = None

    def save_responses(self, responses: Sequence[Response]) -> None:
        """On return the responses are on disk."""
        assert self._shards is not None, "a finished run takes no responses"
        self._shards.append_responses(responses)
        for response in responses:
            self.saved.add_response(response)

    def save_judgement(self, judge: str, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """On return the judge's verdicts on these rows, possibly none, are on disk."""
        assert self._shards is not None, "a finished run takes no verdicts"
        self._shards.append_judgement(judge, rows, verdicts, key=_keys(self.settings)[judge])
        self.saved.add_judgement(judge, rows, verdicts)

    def finish(self, samples: Sequence[SampleInfo]) -> None:
        """Compact the shards in canonical order, write the summary and all hashes, and delete the shards.

        run.json marks a run as finished, so it is written last. When results are replaced, it is also written before
        them, with the hashes of both: a kill in between leaves either the old or the new results, and the shards as
        long as they are needed.

        Raises:
            RunError: If an answer or verdict is missing from the shards, or writing fails.
        """
        responses, verdicts = _in_order(self.saved, samples, self.settings)
        tables = responses_in_table(samples, responses), verdicts_in_table(verdicts)
        try:
            summary = self._summarise(checked_scores(*tables, self.settings), self.settings)
        except UnreadableError as error:
            raise RunError(
                f"{self.path / 'shards'} is not a complete run ({error}); remove it and rerun the same command"
            ) from error
        files = {
            "responses.parquet": to_parquet(tables[0]),
            "verdicts.parquet": to_parquet(tables[1]),
            "summary.json": _to_json(summary),
        }
        results = {
            "settings": settings_hash(self.settings),
            "origin": settings_hash(self._head["origin"]),
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        head = {**self._head, "results": results}
        if self._was_finished:
            stored = read_head(self.path)
            before = {name: stored[name] for name in ("format", "settings", "origin", "results")}
            after = {name: head[name] for name in ("settings", "origin", "results")}
            write_whole(self.path / "run.json", _to_json({**before, "next": after}))
        for name, content in files.items():
            write_whole(self.path / name, content, mode=PUBLIC if name == "summary.json" else PRIVATE)
        write_whole(self.path / "run.json", _to_json(head))
        self.is_finished = True
        self._drop_shards()

    def _drop_shards(self) -> None:
        """Delete the shards, unless they contain verdicts of an interrupted further judge, which may be resumed."""
        self.close()
        folder = self.path / "shards"
        if folder.exists() and not self.saved.others:
            with writing(folder):
                shutil.rmtree(folder)


def check_folder(path: str | Path) -> None:
    """Check that a folder may become a run or is one; creates nothing.

    Raises:
        RunError: If it may not.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; choose a new folder")
    with writing(path):
        entries = {entry.name for entry in path.iterdir()}
    if "run.json" in entries:
        read_head(path)  # refuse another program's file of this name before anything is written
        return
    # A start that was killed at once leaves these behind, empty.
    others = entries - {"shards", ".run.json.part"}
    others |= {f"shards/{shard.name}" for shard in (path / "shards").glob("*") if shard.stat().st_size}
    if others:
        raise RunError(f"{path} is not empty and not a run (it contains {min(others)}); choose a new folder")


def saved_in(path: str | Path) -> Saved:
    """The contents of the shards of an unfinished run; empty if there is no run.

    Raises:
        RunError: If they cannot be read.
    """
    path = Path(path)
    if not (path / "run.json").exists():
        return Saved()
    return read_shards(path / "shards", run_key=_run_key(read_head(path)["settings"]))


def _check_same(
    path: Path, stored: Settings, settings: Settings, judges: Sequence[JsonObject], *, is_finished: bool
) -> None:
    """Refuse other settings. Judges may be added and, to a finished run, left out, if those that report stay."""
    own, given = ({judge["name"]: judge for judge in some["judges"]} for some in (stored, settings))
    common = own.keys() & given.keys()
    changed = differences(
        {**stored, "judges": {name: own[name] for name in own if name in common}},
        {**settings, "judges": {name: given[name] for name in given if name in common}},
    )
    if not is_finished:
        changed += [f"judge {name} was used, is now left out" for name in own if name not in common]
    was, now = _reporting(judges), _reporting(settings["judges"])
    changed += [
        f"{measure} was judged first by {was[measure]}, is now by {now[measure]}"
        for measure in now
        if was[measure] != now[measure]
    ]
    if changed:
        raise RunError(
            f"{path} is a run with other settings: {'; '.join(changed)}; "
            "choose a new folder or go back to these settings"
        )


def _reporting(judges: Sequence[JsonObject]) -> dict[str, str]:
    """By measure, the judge that reports it: the first that has it."""
    found: dict[str, str] = {}
    for judge in judges:
        for measure in judge["measures"]:
            found.setdefault(measure, judge["name"])
    return found


def _in_order(saved: Saved, samples: Sequence[SampleInfo], settings: Settings) -> tuple[list[Response], list[Verdict]]:
    """The responses and verdicts that the run's settings ask for, whatever else is in the shards."""
    sample_order = {sample.id: place for place, sample in enumerate(samples)}
    measure_order = {
        (judge, measure): (place, part)
        for place, (judge, measures) in enumerate(names_and_measures(settings))
        for part, measure in enumerate(measures)
    }
    layers = set(settings["exit_layers"])
    asked = {row for row in saved.responses if row[0] in sample_order and row[1] in layers}
    responses = sorted((saved.responses[row] for row in asked), key=lambda r: (sample_order[r.sample_id], r.exit_layer))
    verdicts = sorted(
        (v for v in saved.verdicts if (v.sample_id, v.exit_layer) in asked and (v.judge, v.measure) in measure_order),
        key=lambda v: (sample_order[v.sample_id], v.exit_layer, measure_order[v.judge, v.measure]),
    )
    return responses, verdicts


def _run_key(settings: Settings) -> str:
    """A hash of everything that decides the answers: all settings except the judges."""
    return settings_hash({name: value for name, value in settings.items() if name != "judges"})


def _check_writable(head: JsonObject) -> None:
    """Raise InputError for settings that could not be read back."""
    try:
        check_head(head)
    except UnreadableError as error:
        raise InputError(f"these settings cannot be stored in a run ({error})") from error


def _keys(settings: Settings) -> dict[str, str]:
    """By judge, a hash of everything that decides its verdicts."""
    return {judge["name"]: hashlib.sha256(canonical_json(judge).encode()).hexdigest() for judge in settings["judges"]}


def _to_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
