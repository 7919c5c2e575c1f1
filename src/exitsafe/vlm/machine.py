"""What a time was measured on: machine, device and libraries, as a JSON object. Names no host and no user."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exitsafe.errors import InputError

_LIBRARIES = ("torch", "transformers", "peft")
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Everything but the model that may change how long it takes.

    Args:
        device: Where the model runs.

    Raises:
        InputError: If it is not there.
    """
    return {
        "device": device.type,
        "device_name": _cpu_name() if device.type == "cpu" else _gpu_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _gpu_name(device: torch.device) -> str:
    try:
        return str(torch.cuda.get_device_name(device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"device {device} is not there; choose auto, cpu or cuda:N of this machine") from error


def _cpu_name() -> str:
    """Linux keeps it in a file; elsewhere the system says it."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor()
