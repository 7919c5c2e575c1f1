"""Other processes in a test: forks of this one, which has everything loaded, alone or joined by gloo."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from accelerate import PartialState

LONGEST = 300.0  # seconds; a hanging process fails the test


def start(num_processes: int, work: Callable[[int], None]) -> list[int]:
    """Fork; `work(number)` runs in each process as under `accelerate launch`. Returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(partial(_join, number, num_processes, port, work)) for number in range(num_processes)]


def fork(work: Callable[[], object]) -> int:
    """Do the work in a fork, which ends with status 0 or prints why not. Returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # a forked process cannot use the parent's thread pool
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # a fork must never come back into pytest
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _join(number: int, num_processes: int, port: int, work: Callable[[int], None]) -> None:
    where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    PartialState._reset_state()
    work(number)
    if dist.is_initialized():
        dist.destroy_process_group()


def wait(children: Sequence[int]) -> list[int]:
    """Exit status of each (minus the signal that killed it); as a launcher would, ends all when one has failed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def together(num_processes: int, work: Callable[[int], None]) -> None:
    """Fork, wait, and see that all have done it."""
    assert wait(start(num_processes, work)) == [0] * num_processes


def killed_at_sync(number: int, work: Callable[[], object]) -> bool:
    """Whether the work, in a fork, was killed: `kill -9` at the n-th time that something is flushed to disk."""

    def killing() -> None:
        left = number

        def fsync(descriptor: int) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            real(descriptor)

        real, os.fsync = os.fsync, fsync  # type: ignore[assignment]
        work()

    return killed(fork(killing))


def killed(child: int) -> bool:
    """Whether a fork that did its work was killed; it must not have failed by itself."""
    (status,) = wait([child])
    assert status in (0, -signal.SIGKILL), "the work failed by itself"
    return status != 0
