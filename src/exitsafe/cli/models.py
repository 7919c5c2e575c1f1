"""Loading a model for a command: as `load_vlm`, without the libraries' chatter. Warnings stay."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
