"""Loading a model, or its config, for a command: without the libraries' chatter. Warnings stay."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from exitsafe.errors import InputError

if TYPE_CHECKING:
    import torch

    from exitsafe.doctor import Blueprint
    from exitsafe.vlm import VLM


def load_model(model: str, *, quantization: str | None = None, **flags: Any) -> VLM:
    """`load_vlm`; a download shows its bar, reading weights from disk shows none."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    is_silent = are_progress_bars_disabled()
    disable_progress_bar()  # takes those of downloads along
    if not is_silent:
        enable_progress_bars()
    if quantization is not None:
        logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    from exitsafe.vlm import load_vlm

    return load_vlm(model, quantization=quantization, **flags)


def read_blueprint(model: str, **flags: Any) -> Blueprint:
    """`load_blueprint`, without transformers' remarks on a config: what they say stands in the tables anyway."""
    from transformers.utils import logging

    from exitsafe.doctor import load_blueprint

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_blueprint(model, **flags)
    finally:
        logging.set_verbosity(before)


def torch_device(name: str) -> torch.device:
    """The device of --device.

    Raises:
        InputError: If torch knows no such name.
    """
    import torch

    from exitsafe.vlm.processes import own_device

    if name == "auto":
        return own_device()
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; choose auto, cpu or cuda:N") from error
