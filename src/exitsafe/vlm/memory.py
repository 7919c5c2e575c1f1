"""How much memory is free, how many rows fit into it, what running out of it looks like, and how to make room.

Knows nothing about samples or runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

_CGROUP = Path("/sys/fs/cgroup")
MOST_ROWS = 256  # more rows at a time hardly gain speed on any machine, and lengthen the tail
SHARE = 0.7  # of what is free; the rest is for activations and for what a cache leaves unused


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        # what torch has set aside and does not use counts as free
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine; all share its memory
    return min(int(psutil.virtual_memory().available), _left_in_container()) // num_processes


def _left_in_container() -> int:
    """Bytes below the limit of a container (cgroup v2); no limit is a very large number."""
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # not in a container, or "max"
        return sys.maxsize
    return max(0, limit - used)


@dataclass(frozen=True, kw_only=True)
class ImageStates:
    """What layers that read pictures by cross-attention keep in the cache, instead of the text's keys and values."""

    num_layers: int = 0
    per_row: int = 0


NO_STATES = ImageStates()


def cache_bytes(text_config: Any, *, num_tokens: int, dtype: torch.dtype, images: ImageStates = NO_STATES) -> int:
    """Bytes of one row's key-value cache at its full length."""
    num_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    num_kept = (text_config.num_hidden_layers - images.num_layers) * num_tokens + images.num_layers * images.per_row
    return int(2 * num_heads * head_dim * num_kept * dtype.itemsize)


def rows_that_fit(
    text_config: Any, *, num_tokens: int, dtype: torch.dtype, device: torch.device, images: ImageStates = NO_STATES
) -> int:
    """How many rows of up to `num_tokens` tokens to generate at a time: 1 to `MOST_ROWS`.

    An estimate from the cache, twice (joining batches copies it), and from one layer's activations while the prompt
    is read; running out of memory all the same is for the caller to handle.

    Args:
        text_config: The language model's.
        num_tokens: Prompt, images and answer together.
        dtype: Of the model.
        device: Of the model.
        images: What the cache holds of a row's pictures, where that is not among the tokens.
    """
    per_row = row_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(max(1, min(MOST_ROWS, SHARE * free_memory(device) // per_row)))


def row_bytes(text_config: Any, *, num_tokens: int, dtype: torch.dtype, images: ImageStates = NO_STATES) -> int:
    """Bytes that a row under generation takes at most: its cache, twice, and one layer's activations."""
    width = text_config.hidden_size * 4 + text_config.intermediate_size * 2
    cache = cache_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(2 * cache + num_tokens * width * dtype.itemsize)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(should_reduce_batch_size(error))


def release_memory() -> None:
    """Give unused cached memory back to the device, after an out-of-memory or before another model loads."""
    clear_device_cache(garbage_collection=True)


@contextmanager
def offloaded(model: Any, device: torch.device) -> Iterator[None]:
    """Keep a model's weights in main memory meanwhile, so that its GPU is free for something else."""
    if device.type == "cpu":
        yield
        return
    model.to("cpu")
    release_memory()
    try:
        yield
    finally:
        release_memory()
        model.to(device)
