"""The folder of a training run: settings, metrics, checkpoints and, at the end, the adapter.

run.json         settings that make it this run; sizes and versions it began with
metrics.jsonl    one line per step; no response text
completions.jsonl    some answers of some steps, if asked for; readable by the owner only
evaluations.jsonl    one line per held-out evaluation, if there are any; numbers only
checkpoints/     to resume from after an interrupt
result.json      which step the adapter is from, why, and whether anything was learnt
adapter/         the PEFT folder, with trained_on.json, the digests of its samples; exists only when the run is
                 finished
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from exitsafe.errors import ExitsafeError, RunError
from exitsafe.lppo.config import SIZES, LPPOConfig
from exitsafe.records import Sample
from exitsafe.results.run import load_run
from exitsafe.store.files import PRIVATE, PUBLIC, locked, refuse_link, write_whole, writing
from exitsafe.store.fingerprint import (
    Settings,
    data_fingerprint,
    differences,
    model_fingerprint,
    request_digest,
    sample_info,
)
from exitsafe.untrusted import UnreadableError, parse_json, read_json

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_PACKAGES = ("exitsafe", "torch", "transformers", "peft")
METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"
_MODES = {METRICS: PUBLIC, COMPLETIONS: PRIVATE, EVALUATIONS: PUBLIC}
_LEFT_BY_A_KILL = {".run.json.part", ".lock"}


class Result(TypedDict, total=False):
    """The content of result.json."""

    steps: int
    adapter_step: int
    why: str  # the adapter is from this step
    stopped_early: bool  # this and the next three with held-out evaluation only
    objective: float | None
    objective_untrained: float | None
    kl: float | None
    learnt: bool
    why_not: str | None
    answers: int
    unscored_answers: int
    minibatches: int
    skipped_minibatches: int
    constant_steps: int


class TrainingFolder:
    """One run's folder, created or reopened by `open`. Of several processes one writes; for the others, methods that
    write do nothing."""

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def open(cls, path: Path, settings: Settings, sizes: Settings, *, is_writer: bool = True) -> TrainingFolder:
        """Start a run, or resume the one in the folder.

        Args:
            path: The folder.
            settings: What makes it this run.
            sizes: What may differ on resume; recorded only.
            is_writer: False where another process writes, which has opened the folder already.

        Raises:
            RunError: If the folder holds a run with other settings, or something else.
        """
        record = path / "run.json"
        if record.is_file():
            _check_same(record, settings)
        elif path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _LEFT_BY_A_KILL):
            raise RunError(f"{path} is not a training run: choose a new or empty folder")
        elif not is_writer:
            raise RunError(f"{path} is not visible to all processes: give a folder on a shared disk")
        else:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
            _write_json(record, {"settings": settings, "sizes": sizes, "versions": versions})
        return cls(path, is_writer=is_writer)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder: a second run that trains into it is refused."""
        return locked(self.path / ".lock") if self.is_writer else nullcontext()

    @property
    def is_finished(self) -> bool:
        return self.adapter.is_dir()

    @property
    def result(self) -> Result | None:
        """The result of a finished run; None of one that is not finished, or whose method writes none."""
        file = self.path / "result.json"
        if not self.is_finished or not file.is_file():
            return None
        return cast(Result, read_record(file))

    def append(self, name: str, *lines: Mapping[str, object]) -> None:
        """Append lines to `METRICS`, `COMPLETIONS` or `EVALUATIONS`."""
        if not self.is_writer or not lines:
            return
        file = self.path / name
        refuse_link(file)
        with writing(file):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _MODES[name])
            with os.fdopen(descriptor, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def drop_lines_from(self, step: int) -> None:
        """Drop the lines of this step and later ones, which will be done again, and a line that a kill cut short.

        Raises:
            RunError: If a file is damaged.
        """
        if not self.is_writer:
            return
        for name, mode in _MODES.items():
            file = self.path / name
            if name == METRICS or file.exists():
                kept = [line for line in read_lines(file) if line["step"] < step]
                content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
                write_whole(file, content.encode(), mode=mode)

    def save_result(self, result: Result) -> None:
        """Record what the adapter is, before the adapter is written."""
        if self.is_writer:
            _write_json(self.path / "result.json", result)

    def save_adapter(
        self,
        save: Callable[[Path], None],
        *,
        trained_on: Sequence[Sample] = (),
        earlier: Collection[str] = (),
    ) -> None:
        """Let `save` write the adapter under a temporary name, then rename it, so that it is never there in part.

        Args:
            save: Writes the PEFT folder, or folders.
            trained_on: Samples whose digests are stored with it, so that an audit can tell which it was trained on.
            earlier: Digests of the samples that it was trained on before.
        """
        if not self.is_writer:
            return
        from exitsafe.exits.adapters import TRAINED_ON, trained_on_record

        beside = self.path / ".adapter.part"
        with writing(beside):
            shutil.rmtree(beside, ignore_errors=True)
            save(beside)
            if trained_on:
                write_whole(beside / TRAINED_ON, trained_on_record([*map(request_digest, trained_on), *earlier]))
            beside.rename(self.adapter)


def warn_of_audited(samples: Sequence[Sample], out: Path) -> None:
    """Warn if training samples were used in a finished audit next to the training's folder.

    An audit of the trained model on the same samples would measure training performance, not generalisation.
    """
    parent = out.absolute().parent
    if not parent.is_dir():
        return
    digests = {sample_info(sample).digest for sample in samples}
    found = []
    for run in sorted(place for place in parent.iterdir() if (place / "summary.json").is_file()):
        try:
            asked = load_run(run).samples()
        except ExitsafeError:  # not a run of this version
            continue
        if both := sum(sample.digest in digests for sample in asked):
            found.append(f"{both} of {len(asked)} samples of {run.name}")
    if found:
        warnings.warn(
            f"training on samples that were audited: {', '.join(found)}; audit the adapter on other samples, or its "
            "numbers measure training performance, not generalisation",
            stacklevel=3,
        )


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a finished training.

    Raises:
        RunError: If it is damaged.
    """
    try:
        return read_json(file)
    except UnreadableError as error:
        raise RunError(f"{file} cannot be read ({error}): restore or remove it; the adapter is kept") from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, completions.jsonl or evaluations.jsonl; none if there is no such file.

    Raises:
        RunError: If one is not what a training writes.
    """
    if not file.exists():
        return []
    try:
        if not file.is_file():
            raise UnreadableError("it is not a regular file")
        lines = file.read_bytes().splitlines(keepends=True)
        read = [parse_json(line) for line in lines if line.endswith(b"\n")]
        if not all(isinstance(line.get("step"), int) for line in read):
            raise UnreadableError("a line has no step")
        return read
    except (OSError, UnreadableError) as error:
        raise RunError(
            f"{file} is damaged ({error}); remove it and rerun the same command: the training itself does not need it"
        ) from error


def run_settings(
    vlm: VLM, samples: Sequence[Sample], exit_layers: Sequence[int], config: LPPOConfig
) -> tuple[dict[str, object], dict[str, object]]:
    """The settings that must not change on resume, and the sizes that may."""
    constants = asdict(config)
    sizes = {name: constants.pop(name) for name in SIZES}
    settings: dict[str, object] = {
        "method": constants.pop("method"),
        "model": model_fingerprint(vlm),
        "data": data_fingerprint([sample_info(sample) for sample in samples]),
        "prompts": vlm.read_ahead(samples, max_new_tokens=config.max_new_tokens).settings,
        "trained_exits": list(exit_layers),
        "config": constants,
    }
    return settings, sizes


def _check_same(record: Path, settings: Settings) -> None:
    try:
        old = read_json(record)["settings"]
        if not isinstance(old, dict):
            raise UnreadableError("settings is not an object")
    except (UnreadableError, KeyError) as error:
        raise RunError(f"{record} is not a training run's record ({error}): choose another folder") from error
    changed = differences(old, json.loads(json.dumps(settings)))
    if changed:
        raise RunError(
            f"{record.parent} holds a run with other settings ({'; '.join(changed)}): "
            "choose another folder, or use the same settings to resume"
        )


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    write_whole(file, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
