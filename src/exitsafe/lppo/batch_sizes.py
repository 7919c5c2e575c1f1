"""The batch sizes of a training, halved when memory runs out: all processes agree on them, checkpoints keep them.

A resumed run starts with the sizes that the interrupted one had reached, so that both compute the same batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from exitsafe.engine.generation import NO_MEMORY as NO_ROW
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.machine.memory import BatchSize

NO_PASS = (
    "out of memory in a training pass over a single answer: use fewer new tokens (max_new_tokens), or load with "
    "--quantization nf4; then rerun the same command to resume"
)
KeptSizes = dict[str, tuple[int, int]]
"""For a checkpoint: by name, the size that the settings ask for and the one that fits."""


class BatchSizes:
    """How much of a step runs at a time.

    Attributes:
        rollout: Rows generated at a time.
        microbatch: Padded tokens in a training pass.
    """

    def __init__(self, config: LPPOConfig, team: Team = ALONE) -> None:
        self._team = team
        self.rollout = _fixed_if_sharded("rollout_batch_size", config.rollout_batch_size, NO_ROW, team)
        self.microbatch = _fixed_if_sharded("microbatch_tokens", config.microbatch_tokens, NO_PASS, team)
        self._sizes = {"rollout_batch_size": self.rollout, "microbatch_tokens": self.microbatch}
        self._asked = {name: size.most for name, size in self._sizes.items()}
        self._agreed = dict(self._asked)

    def agree(self, step: int) -> None:
        """Use the smallest size of all processes from the next step on, and warn of what was halved in this one."""
        found = self._team.reduce(min, {name: size.most for name, size in self._sizes.items()})
        smaller = [f"{name} is now {most}" for name, most in found.items() if most < self._agreed[name]]
        if smaller and self._team.is_first:
            warnings.warn(
                f"out of memory in step {step}: {' and '.join(smaller)}, which changes results by rounding alone",
                RuntimeWarning,
                stacklevel=2,
            )
        self._take(found)

    def state(self) -> KeptSizes:
        """For a checkpoint."""
        return {name: (self._asked[name], self._agreed[name]) for name in self._sizes}

    def load_state(self, kept: Mapping[str, tuple[int, int]]) -> None:
        """Use the sizes of a checkpoint, except where the settings ask for another size than when it was written."""
        self._take({name: fitting for name, (asked, fitting) in kept.items() if asked == self._asked.get(name)})

    def _take(self, sizes: Mapping[str, int]) -> None:
        for name, most in sizes.items():
            self._sizes[name].most = self._agreed[name] = most


def _fixed_if_sharded(name: str, most: int, problem: str, team: Team) -> BatchSize:
    """Processes that share sharded weights must run as many passes each, so they cannot halve a size as they run."""
    if team.is_sharded:
        problem = (
            f"out of memory with {name}={most}, and processes that share sharded weights cannot halve it as they run: "
            f"set {name}: {max(1, most // 2)} in --config FILE.yaml, then rerun the same command to resume"
        )
    return BatchSize(most, problem=problem, is_fixed=team.is_sharded)
