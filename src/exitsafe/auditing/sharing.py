"""Shares one run among processes: which process does which task, and when they wait for each other.

Each process writes its own shard in the run directory and reads the others' work from theirs; no answers are sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from exitsafe.engine.answering import Task
from exitsafe.machine.processes import wait_for_all
from exitsafe.results.run import summarise_run
from exitsafe.store.directory import RunDirectory
from exitsafe.store.fingerprint import Settings
from exitsafe.store.tables import SampleInfo


@contextmanager
def open_run(
    out: str | Path,
    settings: Settings,
    origin: Settings | None,
    process: PartialState,
    *,
    retried: Collection[str] = (),
) -> Iterator[RunDirectory]:
    """The run in every process: the first creates it, and none writes before all have read what exists."""
    if not process.is_main_process:
        wait_for_all(process)
    run = RunDirectory(
        out, summarise=summarise_run, settings=settings, origin=origin, process=process.process_index, retried=retried
    )
    if process.is_main_process:
        wait_for_all(process)
    wait_for_all(process)
    with run:
        yield run


def gather(run: RunDirectory, process: PartialState) -> None:
    """Wait for all processes and read what they have saved."""
    wait_for_all(process)
    if process.num_processes > 1:
        run.reload()
        wait_for_all(process)  # none may write while another reads


def finish(run: RunDirectory, infos: Sequence[SampleInfo], process: PartialState) -> None:
    """The first process compacts the run; the others wait for it."""
    if not process.is_main_process:
        run.close()  # a network disk cannot remove an open shard
    wait_for_all(process)
    if process.is_main_process:
        run.finish(infos)
    wait_for_all(process)


def share(tasks: Sequence[Task], process: PartialState) -> list[Task]:
    """This process's tasks, dealt out in turn by length; if there are few samples, their layers are dealt out too."""
    if process.num_processes == 1:
        return list(tasks)
    num_parts = -(-process.num_processes // max(1, len(tasks)))
    parts = [
        Task(sample=task.sample, exit_layers=task.exit_layers[part::num_parts])
        for task in sorted(tasks, key=lambda task: len(task.sample.prompt))
        for part in range(num_parts)
        if task.exit_layers[part::num_parts]
    ]
    return parts[process.process_index :: process.num_processes]
