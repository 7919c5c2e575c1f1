"""Memory: how much is free, how many rows fit, the peak, and the loop that halves a batch when memory runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from exitsafe.errors import RunError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

_CGROUP = Path("/sys/fs/cgroup")
MOST_ROWS = 256  # more rows at a time are hardly faster on any machine, and lengthen the tail
SHARE = 0.7  # of the free memory; the rest is for activations and fragmentation


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        # what torch has reserved but does not use is free
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, whose memory they share
    return min(int(psutil.virtual_memory().available), _left_in_container()) // num_processes


def _left_in_container() -> int:
    """Bytes left below the container's limit (cgroup v2); a very large number if there is none."""
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # not in a container, or "max"
        return sys.maxsize
    return max(0, limit - used)


@dataclass(frozen=True, kw_only=True)
class ImageStates:
    """The states that cross-attention layers cache for pictures, in place of the text's keys and values."""

    num_layers: int = 0
    per_row: int = 0


NO_STATES = ImageStates()


def cache_bytes(
    text_config: PretrainedConfig, *, num_tokens: int, dtype: torch.dtype, images: ImageStates = NO_STATES
) -> int:
    """Bytes of one row's key-value cache at its full length."""
    num_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    num_kept = (text_config.num_hidden_layers - images.num_layers) * num_tokens + images.num_layers * images.per_row
    return int(2 * num_heads * head_dim * num_kept * dtype.itemsize)


def rows_that_fit(
    text_config: PretrainedConfig, *, num_tokens: int, dtype: torch.dtype, free: int, images: ImageStates = NO_STATES
) -> int:
    """The number of rows of up to `num_tokens` tokens to generate at a time: 1 to `MOST_ROWS`.

    An estimate from twice the cache (joining batches copies it) and one layer's activations during prefill; callers
    must still handle running out of memory.

    Args:
        text_config: The language model's config.
        num_tokens: Prompt, images and answer together.
        dtype: The model's number type.
        free: Free memory in bytes.
        images: The states cached for a row's pictures, if they are not among the tokens.
    """
    per_row = row_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(max(1, min(MOST_ROWS, SHARE * free // per_row)))


def row_bytes(
    text_config: PretrainedConfig, *, num_tokens: int, dtype: torch.dtype, images: ImageStates = NO_STATES
) -> int:
    """The most bytes that a row takes during generation: twice its cache, and one layer's activations."""
    width = text_config.hidden_size * 4 + text_config.intermediate_size * 2
    cache = cache_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(2 * cache + num_tokens * width * dtype.itemsize)


class BatchSize:
    """The number of items to process at a time, halved permanently whenever memory runs out.

    Args:
        most: The initial size.
        problem: The error message if halving does not help: what did not fit, and what to do.
        fits: A further bound that may change from one piece of work to the next; None for none.
        is_fixed: Whether to raise at once instead of halving.
    """

    def __init__(self, most: int, *, problem: str, fits: int | None = None, is_fixed: bool = False) -> None:
        self.most, self.problem, self.fits, self.is_fixed = most, problem, fits, is_fixed

    @property
    def size(self) -> int:
        """Items to try next."""
        return self.most if self.fits is None else min(self.most, self.fits)

    def halving(self, work: Callable[[int], Iterable[Result]], *, least: int = 1) -> Iterator[Result]:
        """The results of `work` at the current size, called again at half of it whenever memory runs out.

        Args:
            work: Takes the size; when called again, it must continue after what it has yielded.
            least: The smallest size; a smaller one would not need less memory.

        Raises:
            RunError: If memory runs out at the smallest size; the message is `problem`.
        """
        while True:
            size = self.size
            try:
                yield from work(size)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size <= least or self.is_fixed:
                    raise RunError(self.problem) from error
            self.most = size // 2
            release_memory()  # outside the handler: the error keeps the failed batch alive

    def run(self, work: Callable[[int], Result], *, least: int = 1) -> Result:
        """The single result of `work`, repeated from the start when memory runs out; otherwise like `halving`."""
        (result,) = self.halving(lambda size: [work(size)], least=least)
        return result

    def batches(self, function: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The function's results for consecutive slices of the items.

        >>> list(BatchSize(2, problem="").batches("".join, ["a", "b", "c"]))
        ['ab', 'c']
        """
        done = 0

        def work(size: int) -> Iterator[Result]:
            nonlocal done
            while done < len(items):
                batch = items[done : done + size]
                found = [function(batch)]
                done += len(batch)
                yield found.pop()  # freed while the next one is computed

        yield from self.halving(work)


def as_batch_size(size: int | BatchSize, *, problem: str) -> BatchSize:
    """The batch size itself, or one with this initial size."""
    return size if isinstance(size, BatchSize) else BatchSize(size, problem=problem)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(should_reduce_batch_size(error))


def release_memory() -> None:
    """Return unused cached memory to the device, after running out of memory or before loading another model."""
    clear_device_cache(garbage_collection=True)


@contextmanager
def offloaded(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which a model's weights are in main memory, so that its GPU is free for something else.

    A model whose largest part stays on disk is left where it is.
    """
    if device.type == "cpu" or any(weight.is_meta for weight in model.parameters()):
        yield
        return
    model.to("cpu")
    release_memory()
    try:
        yield
    finally:
        release_memory()
        model.to(device)


MEASURED = ("peak_bytes", "peak_reserved_bytes", "peak_process_bytes")
"""The readings of a `Gauge`: allocated and reserved memory on a GPU, and the process's memory on the CPU."""


class Gauge:
    """The peak memory of this process on a device, in bytes.

    On a GPU it is the peak of torch's tensors between one reading and the next. On the CPU, where torch keeps no such
    count, it is the peak resident memory of the process, Python and libraries included, since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, int]:
        """The peaks by name; on a GPU since the last reading."""
        if self.device.type != "cuda":
            return {"peak_process_bytes": _most_resident()}
        found = {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def _most_resident() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
