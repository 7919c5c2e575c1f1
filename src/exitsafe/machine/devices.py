"""Devices and number types by name, and a description of the machine that times are measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch

from exitsafe.errors import InputError
from exitsafe.machine.processes import own_device
from exitsafe.specs.inputs import DType, Quantization
from exitsafe.untrusted import JsonObject

DTYPES = tuple(name for name in get_args(DType) if name != "auto")
QUANTIZATIONS = get_args(Quantization)
_LIBRARIES = ("torch", "transformers", "peft")
_CPUINFO = Path("/proc/cpuinfo")


def find_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is this process's GPU, or the CPU if there is none.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        InputError: If the name is unknown to torch, or this machine has no such GPU.
    """
    if device == "auto":
        return own_device()
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown; choose auto, cpu or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {str(device)!r}: torch sees {torch.cuda.device_count()} GPUs here; choose auto or cpu"
        )
    return found


def find_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A number type by its name; None for "auto", which is the type of the checkpoint.

    Raises:
        InputError: If models cannot be loaded in it.
    """
    if dtype == "auto":
        return None
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype {str(dtype)!r} is unknown; choose auto, {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, str(dtype).removeprefix("torch."))
    return found


def check_quantization(quantization: str | None) -> None:
    """Raise InputError for an unknown kind of quantization; None is no quantization."""
    if quantization not in (None, *QUANTIZATIONS):
        raise InputError(f"quantization {quantization!r} is unknown; choose {', '.join(QUANTIZATIONS)}")


def describe_machine(device: torch.device) -> JsonObject:
    """Everything but the model that may affect its speed, as a JSON object, without names of host or user."""
    return {
        "device": device.type,
        "device_name": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _cpu_name() -> str:
    """The CPU's name: from a file on Linux, from the operating system elsewhere."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor()
