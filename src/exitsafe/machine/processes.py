"""Which of several processes this is: one alone, or one of those that `accelerate launch` started.

Knows nothing about what the processes share out.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from exitsafe.errors import RunError

_PATIENCE = timedelta(days=30)  # a process that has done its share waits for the slowest one, however long


def this_process() -> PartialState:
    """Accelerate's word on index and count; the first call joins the other processes."""
    return PartialState(cpu=not _uses_gpu(), timeout=_PATIENCE)


def wait_for_all(process: PartialState) -> None:
    """Go on when every process has come to this point.

    Raises:
        RunError: If one of them has failed.
    """
    try:
        process.wait_for_everyone()
    except RuntimeError as error:
        raise RunError(
            "another process has failed, and its own line says why; what was saved is kept: mend that and start again"
        ) from error


def own_device() -> torch.device:
    """This process's GPU, the first one for a process alone; the CPU where there is none or none is wanted."""
    if not _uses_gpu():
        return torch.device("cpu")
    return torch.device("cuda", this_process().local_process_index)


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
