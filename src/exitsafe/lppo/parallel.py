"""Several processes that train one policy: what each does of a step, and how they tell each other.

Every process holds the whole policy and knows all answers, scores and log-probabilities of a step: numbers, which are
small. What costs time is shared out: rollouts, scoring, forward and backward passes. So all decide alike, and nothing
outside this file has to know how many there are. Alone, everything here changes nothing. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    Every method that tells or waits must be called by all, in the same order.

    Args:
        process: Accelerate's word on who this is; None for a process that works alone.

    Attributes:
        size, number: How many they are, and which of them this is.
        is_sharded: Whether the frozen weights are cut up among them (`sharding.py`).

    Raises:
        RunError: From whatever tells or waits, if another process has failed.
    """

    def __init__(self, process: PartialState | None = None) -> None:
        self.process = process
        self.size = 1 if process is None else process.num_processes
        self.number = 0 if process is None else process.process_index
        self.device = torch.device("cpu") if process is None else process.device
        self.is_sharded = self.size > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.number == 0

    def places(self, count: int, *, group_size: int = 1) -> list[int]:
        """Which of `count` places are this process's: every n-th group, groups stay whole.

        >>> Team().places(4, group_size=2)
        [0, 1, 2, 3]
        """
        return [place for place in range(count) if place // group_size % self.size == self.number]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1 and self.process is not None:
            wait_for_all(self.process)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what is inside, then all others do."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
        self.wait()

    def merge(self, own: Mapping[int, T]) -> list[T]:
        """What all have found, by place; each place is somebody's."""
        found = {place: item for part in self.gather(own) for place, item in part.items()}
        return [found[place] for place in range(len(found))]

    def gather(self, own: T) -> list[T]:
        """Everybody's, in the order of the processes."""
        if self.size == 1:
            return [own]
        everybodys = [own] * self.size
        with _failure_told():
            dist.all_gather_object(everybodys, own)
        return everybodys

    def largest(self, own: Mapping[str, int]) -> dict[str, int]:
        """Of each name, the largest that one of them has."""
        everybodys = self.gather(own)
        return {name: max(found[name] for found in everybodys) for name in own}

    def smallest(self, own: Mapping[str, int]) -> dict[str, int]:
        """Of each name, the smallest that one of them has."""
        everybodys = self.gather(own)
        return {name: min(found[name] for found in everybodys) for name in own}

    def any(self, own: bool) -> bool:
        """Whether one of them says so."""
        return self.sum(torch.tensor(float(own))).item() > 0

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all, the same bits everywhere."""
        if self.size == 1:
            return own
        summed = own.detach().to(self.device, copy=True)
        with _failure_told():
            dist.all_reduce(summed)
        return summed.to(own.device)

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Put the sum of all processes' gradients in place of the own; a weight that none has one for keeps none."""
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
        """Overwrite with the first process's, so that all begin with the same bits."""
        if self.size == 1:
            return
        for weight in weights:
            told = weight.detach().to(self.device, copy=True)
            with _failure_told():
                dist.broadcast(told, src=0)
            weight.detach().copy_(told)


ALONE = Team()


def this_team() -> Team:
    """The team that this process was started in; the first call joins it."""
    return Team(this_process())


@contextmanager
def _failure_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another process has failed, and its own line says why; what was saved is kept: mend that and start again"
        ) from error
