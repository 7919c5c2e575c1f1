"""Loading a model for a command: as `load_vlm`, without the libraries' chatter. Warnings stay."""

from __future__ import annotations

import logging
import warnings
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
    # PEFT reads a name that transformers has renamed: nothing a user can mend
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if quantization is None:
        # PEFT imports bitsandbytes, which misses kernels of quantised models
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from exitsafe.vlm import load_vlm

    return load_vlm(model, quantization=quantization, **flags)
