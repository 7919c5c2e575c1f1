"""Memory: how much is free, how many rows fit, the most that was used, and the loop that halves a batch when it runs
out. Knows nothing about samples or runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from exitsafe.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

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
    text_config: Any, *, num_tokens: int, dtype: torch.dtype, free: int, images: ImageStates = NO_STATES
) -> int:
    """How many rows of up to `num_tokens` tokens to generate at a time: 1 to `MOST_ROWS`.

    An estimate from the cache, twice (joining batches copies it), and from one layer's activations while the prompt
    is read; running out of memory all the same is for the caller to handle.

    Args:
        text_config: The language model's.
        num_tokens: Prompt, images and answer together.
        dtype: Of the model.
        free: Bytes.
        images: What the cache holds of a row's pictures, where that is not among the tokens.
    """
    per_row = row_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(max(1, min(MOST_ROWS, SHARE * free // per_row)))


def row_bytes(text_config: Any, *, num_tokens: int, dtype: torch.dtype, images: ImageStates = NO_STATES) -> int:
    """Bytes that a row under generation takes at most: its cache, twice, and one layer's activations."""
    width = text_config.hidden_size * 4 + text_config.intermediate_size * 2
    cache = cache_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images)
    return int(2 * cache + num_tokens * width * dtype.itemsize)


class BatchSize:
    """How many items to work on at a time: halved for good whenever memory runs out.

    Args:
        most: To begin with.
        problem: The error's text where halving does not help: what did not fit, and the way out.
        fits: A further bound that may change from one piece of work to the next; None for none.
        is_fixed: Whether running out of memory is an error at once.
    """

    def __init__(self, most: int, *, problem: str, fits: int | None = None, is_fixed: bool = False) -> None:
        self.most, self.problem, self.fits, self.is_fixed = most, problem, fits, is_fixed

    @property
    def size(self) -> int:
        """Items to try next."""
        return self.most if self.fits is None else min(self.most, self.fits)

    def halving(self, work: Callable[[int], Iterable[Result]], *, least: int = 1) -> Iterator[Result]:
        """What `work` yields at the current size, called again at half of it whenever memory runs out.

        Args:
            work: Takes the size; must know what it has yielded, and go on behind it when called again.
            least: A smaller size would not need less memory.

        Raises:
            RunError: If memory runs out at the smallest size; the text is `problem`.
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
        """What `work` gives in one piece; done again from its beginning when memory runs out. Else as `halving`."""
        (result,) = self.halving(lambda size: [work(size)], least=least)
        return result

    def batches(self, function: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The function's result for one slice of the items after another.

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
                yield found.pop()  # not kept while the next is made

        yield from self.halving(work)


def as_batch_size(size: int | BatchSize, *, problem: str) -> BatchSize:
    """The batch size itself, or one that begins with this number."""
    return size if isinstance(size, BatchSize) else BatchSize(size, problem=problem)


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


MEASURED = ("peak_bytes", "peak_reserved_bytes", "peak_process_bytes")
"""What a `Gauge` reads: by tensors on a GPU, with what torch has set aside, and of the whole process on the CPU."""


class Gauge:
    """The most memory that this process has held on a device, in bytes.

    On a GPU it is what torch's tensors held between one reading and the next. On the CPU there is no such count: it is
    the resident memory of the whole process, Python and libraries included, and the most since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, int]:
        """The peak by name, on a GPU since the last reading."""
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
