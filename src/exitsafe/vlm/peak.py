"""The most memory that a process has held. A device in, bytes out; knows nothing about plans.

On a GPU it is what torch's tensors held, between one reading and the next. On the CPU there is no such count: it is the
resident memory of the whole process, Python and libraries included, and the most since the process began.
"""

from __future__ import annotations

import sys

import psutil
import torch

MEASURED = ("peak_bytes", "peak_reserved_bytes", "peak_process_bytes")
"""Names of readings: by tensors on a GPU, with what torch has set aside, and of the whole process on the CPU."""


class Gauge:
    """Reads peaks of one device; a new one begins anew.

    Args:
        device: Where the model is, or will be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, int]:
        """The peak by name, in bytes: on a GPU since the last reading."""
        if self.device.type != "cuda":
            return {"peak_process_bytes": _most_resident()}
        found = {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def resident_bytes() -> int:
    """What this process holds of main memory now."""
    return int(psutil.Process().memory_info().rss)


def _most_resident() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
