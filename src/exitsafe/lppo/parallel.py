"""Several processes that train one policy: which part of a step each does, and how they exchange results.

Every process holds the whole policy and all answers, scores and log-probabilities of a step, which are small. The work
is divided: rollouts, scoring, forward and backward passes. So all processes take the same decisions, and code outside
this file does not depend on their number. With a single process, every method is a no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from exitsafe.errors import RunError
from exitsafe.machine.processes import this_process, wait_for_all

T = TypeVar("T")


class Team:
    """The processes that `accelerate launch` started, as one of them sees them.

    Every method that exchanges data or waits must be called by all processes, in the same order.

    Args:
        process: Accelerate's state of this process; None for a single process.

    Attributes:
        size, number: The number of processes, and the index of this one.
        is_sharded: Whether the frozen weights are sharded among them (`sharding.py`).

    Raises:
        RunError: From methods that exchange data or wait, if another process has failed.
    """

    def __init__(self, process: PartialState | None = None) -> None:
        self.process = process
        self.size = 1 if process is None else process.num_processes
        self.number = 0 if process is None else process.process_index
        self.device = torch.device("cpu") if process is None else process.device
        self.is_sharded = self.size > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.number == 0

    def places(self, count: int, *, group_size: int = 1) -> list[int]:
        """Which of `count` places are this process's share: every n-th group; groups are not split.

        >>> Team().places(4, group_size=2)
        [0, 1, 2, 3]
        """
        return [place for place in range(count) if place // group_size % self.size == self.number]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1 and self.process is not None:
            wait_for_all(self.process)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the block before all others."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
        self.wait()

    def merge(self, own: Mapping[int, T]) -> list[T]:
        """The results of all processes in the order of places; each place is in one of them."""
        found = {place: item for part in self.gather(own) for place, item in part.items()}
        return [found[place] for place in range(len(found))]

    def gather(self, own: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [own]
        gathered = [own] * self.size
        with _failure_explained():
            dist.all_gather_object(gathered, own)
        return gathered

    def reduce(self, pick: Callable[[list[int]], int], own: Mapping[str, int]) -> dict[str, int]:
        """For each name, what `pick` (max, min) takes from the values of all processes."""
        gathered = self.gather(own)
        return {name: pick([found[name] for found in gathered]) for name in own}

    def any(self, own: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum(torch.tensor(float(own))).item() > 0

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return own
        summed = own.detach().to(self.device, copy=True)
        with _failure_explained():
            dist.all_reduce(summed)
        return summed.to(own.device)

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replace gradients by their sum over all processes; a weight without a gradient in any of them keeps none."""
        if self.size == 1 or not weights:
            return
        counts = self.sum(torch.tensor([float(weight.grad is not None) for weight in weights])).tolist()
        trained = [weight for weight, count in zip(weights, counts, strict=True) if count]
        if not trained:
            return
        for weight in trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        summed = self.sum(torch.cat([gradient.flatten().float() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def take_first(self, weights: Sequence[Tensor]) -> None:
        """Overwrite weights with those of the first process, so that all start with the same bits."""
        if self.size == 1:
            return
        for weight in weights:
            copy = weight.detach().to(self.device, copy=True)
            with _failure_explained():
                dist.broadcast(copy, src=0)
            weight.detach().copy_(copy)


ALONE = Team()


def this_team() -> Team:
    """The processes that `accelerate launch` started together with this one; the first call connects to them."""
    return Team(this_process())


@contextmanager
def _failure_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another process has failed, and its own message says why; what was saved is kept: fix the cause and rerun"
        ) from error
