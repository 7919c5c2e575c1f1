"""This process among others: a single one, or one of those that `accelerate launch` started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from exitsafe.errors import RunError

_TIMEOUT = timedelta(days=30)  # a process that has done its share waits for the slowest one, however long


def this_process() -> PartialState:
    """Index and count of processes, from accelerate; the first call joins the other processes."""
    return PartialState(cpu=not _uses_gpu(), timeout=_TIMEOUT)


def wait_for_all(process: PartialState) -> None:
    """Wait until every process has reached this point.

    Raises:
        RunError: If one of them has failed.
    """
    try:
        process.wait_for_everyone()
    except RuntimeError as error:
        raise RunError(
            "another process failed; its own error message says why: fix that and rerun the same command, which keeps "
            "what was saved"
        ) from error


def own_device() -> torch.device:
    """This process's GPU (the first one for a single process); the CPU if there is none or it is disabled."""
    if not _uses_gpu():
        return torch.device("cpu")
    return torch.device("cuda", this_process().local_process_index)


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
