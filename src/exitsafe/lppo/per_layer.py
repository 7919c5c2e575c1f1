"""One adapter per exit layer: a training run of its own for each exit, one after another.

    run.json        settings, as of one run; the exits trained
    layer-03/, ...  an ordinary run at that exit alone: what `align` at only this exit would write, bit for bit
    metrics.jsonl   the lines of all runs with their exit, when all are done; watch.jsonl, completions.jsonl likewise
    result.json     by exit, which step its adapter is of, why, and whether anything was learnt
    adapter/        layer-03/, ...: the PEFT folders side by side; there only when all are done

Knows nothing about how a run trains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exitsafe.errors import InputError, RunError
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.folder import COMPLETIONS, TrainingFolder, read_lines
from exitsafe.lppo.interrupt import noted_signals
from exitsafe.lppo.parallel import Team
from exitsafe.records import Progress
from exitsafe.runs.files import PRIVATE, PUBLIC, write_whole


def train_each(
    train: Callable[..., Path],
    exit_layers: Sequence[int],
    config: LPPOConfig,
    settings: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    team: Team,
    out: Path,
    progress: Progress | None = None,
) -> Path:
    """Train an adapter for each exit; what is done is not done again.

    Args:
        train: `align` with all but `config`, `out` and `progress`.
        exit_layers: Exits that get an adapter.
        config: Of every run, but for its exit.
        settings, sizes: From `run_settings`, of the whole.
        team: The processes that share each run.
        out: As of `align`.
        progress: Called before the first and after each step of each run.

    Returns:
        `out/adapter`, with a folder for each exit.

    Raises:
        InputError: If the processes cut up the model's weights.
        KeyboardInterrupt: On SIGINT or SIGTERM, as `align`.
    """
    if team.is_sharded:
        raise InputError(
            "one adapter per exit cannot be trained on weights that are cut up among processes, which they stay after "
            "the first run: start with accelerate launch --multi_gpu, or align each exit by itself"
        )
    with team.first_goes_first():
        folder = TrainingFolder.open(out, settings, sizes, is_writer=team.is_first)
    if folder.is_finished:
        return folder.adapter
    with noted_signals() as stop, folder.locked():
        runs: dict[int, TrainingFolder] = {}
        for place, exit_layer in enumerate(exit_layers):
            run = TrainingFolder(out / f"layer-{exit_layer:02}")
            alone = replace(config, adapters="shared", exit_layers=(exit_layer,), include_default=False)
            stop.message = f"interrupted before exit {exit_layer}; rerun the same command to resume from there"
            try:
                with stop.at_once():
                    train(config=alone, out=run.path, progress=_as_part(progress, exit_layer, place, len(exit_layers)))
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(_named(str(interrupt), exit_layer)) from interrupt
            except RunError as error:
                raise RunError(f"exit {exit_layer}: {error}") from error
            runs[exit_layer] = run
        if team.is_first:
            _gather(runs, folder)
        folder.save_result({"exits": {str(exit_layer): run.result for exit_layer, run in runs.items()}})
        folder.save_adapter(lambda beside: _copy(runs, beside))
        team.wait()
    return folder.adapter


def _as_part(progress: Progress | None, exit_layer: int, place: int, num_runs: int) -> Progress | None:
    """Steps of one run as steps of all, with the exit in front of what is said."""
    if progress is None:
        return None

    def say(done: int, total: int, remark: str) -> None:
        where = f"exit {exit_layer} ({place + 1} of {num_runs})"
        progress(place * total + done, num_runs * total, ": ".join(filter(None, [where, remark])))

    return say


def _named(message: str, exit_layer: int) -> str:
    """The words of an interrupted run, with its exit."""
    return message.replace("interrupted;", f"interrupted at exit {exit_layer};")


def _gather(runs: Mapping[int, TrainingFolder], folder: TrainingFolder) -> None:
    """All runs' lines in one file of each kind, for whoever reads the folder as that of one run."""
    for name in ("metrics.jsonl", "watch.jsonl", COMPLETIONS):
        lines = [
            json.dumps({"exit_layer": exit_layer} | line) + "\n"
            for exit_layer, run in runs.items()
            for line in read_lines(run.path / name)
        ]
        if lines:
            write_whole(folder.path / name, "".join(lines).encode(), mode=PRIVATE if name == COMPLETIONS else PUBLIC)


def _copy(runs: Mapping[int, TrainingFolder], beside: Path) -> None:
    for run in runs.values():
        shutil.copytree(run.adapter, beside / run.path.name)
