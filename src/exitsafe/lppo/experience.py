"""A batch of rollouts as tensors: log-probabilities, values, advantages. Trains nothing.

Rows and responses in, `(B, T)` tensors out, zero outside the mask. Knows nothing about samples, judges or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from exitsafe.engine.packing import sibling_groups
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.exits.finite import check_finite
from exitsafe.lppo.advantage import gae, group_advantages, masked_whiten
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.minibatches import Minibatch, padded_tokens, share_out, split
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.policy import Policy, pack_size
from exitsafe.lppo.reward import shaped_rewards
from exitsafe.machine.memory import BatchSize

Result = TypeVar("Result")
Passes = list[tuple[list[int], bool]]
"""Forward passes: the rows of each, and whether it counts."""
NO_MEMORY = (
    "out of memory in a training pass over a single answer: set gradient_checkpointing: true, use fewer new tokens "
    "(max_new_tokens), or load with --quantization nf4; then rerun the same command to resume"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Responses to rows, dealt into minibatches and microbatches."""

    rows: list[Row]
    responses: list[Tensor]  # token ids, (length,) each
    minibatches: list[Minibatch]
    shares: list[list[Minibatch]]  # of each minibatch, what each process evaluates; [] for a pass that does not count
    microbatch: BatchSize  # padded tokens per forward pass; halved when memory runs out
    num_tokens: int  # of a microbatch, when these were dealt

    def in_passes(self, index: int, team: Team, work: Callable[[Passes], Result]) -> Result:
        """What `work` makes of this process's forward passes for minibatch `index`. When memory runs out, it is called
        again with all passes cut in two.

        A pass that does not count is of a row of the same minibatch: it reaches no weight that the others do not.

        Raises:
            RunError: If memory runs out with a single row.
        """
        some_row = self.minibatches[index][0][:1]
        own = [(rows or some_row, bool(rows)) for rows in self.shares[index][team.number]]

        def cut(size: int) -> Result:
            passes: Passes = []
            for rows, counts in own:
                num_rows = max(1, len(rows) * size // self.num_tokens)
                passes += [(rows[start : start + num_rows], counts) for start in range(0, len(rows), num_rows)]
            return work(passes)

        largest = max((len(rows) for rows, _ in own), default=1)
        return self.microbatch.run(cut, least=self.num_tokens // largest)

    def places(self, team: Team) -> list[int]:
        """The rows that this process evaluates."""
        return [
            place
            for minibatch, shares in zip(self.minibatches, self.shares, strict=True)
            for rows in shares[team.number]
            for place in rows or minibatch[0][:1]
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A batch as the policy that sampled it and the reference see it, all `(B, T)`."""

    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor


def deal(
    vlm: VLM,
    rows: Sequence[Row],
    responses: Sequence[Tensor],
    *,
    config: LPPOConfig,
    rng: np.random.Generator,
    team: Team = ALONE,
    microbatch: BatchSize | None = None,
) -> Batch:
    """Split rows and their responses for the whole step; responses that are packed together stay together.

    The same minibatches whatever the team; only how they are cut hangs on its size. `microbatch` is the size of forward
    passes in tokens, the same in every process; None takes the config's.
    """
    microbatch = microbatch or BatchSize(config.microbatch_tokens, problem=NO_MEMORY)
    sizes = [(len(row.prompt.input_ids), len(response)) for row, response in zip(rows, responses, strict=True)]
    groups = sibling_groups(rows, pack_size(vlm, config))
    minibatches = split(
        sizes,
        [vlm.batch_key(row.prompt) for row in rows],
        groups,
        minibatch_size=config.minibatch_size,
        microbatch_tokens=microbatch.most,
        rng=rng,
        num_shares=team.size,
    )
    shares = [share_out(minibatch, sizes, team.size) for minibatch in minibatches]
    if team.is_sharded:  # all must do as many passes
        for among in shares:
            most = max(len(share) for share in among)
            among[:] = [share + [[]] * (most - len(share)) for share in among]
    microbatch.fits = max(padded_tokens(minibatch, sizes, groups) for minibatch in minibatches)  # what to take half of
    return Batch(
        rows=list(rows),
        responses=list(responses),
        minibatches=minibatches,
        shares=shares,
        microbatch=microbatch,
        num_tokens=microbatch.size,
    )


@torch.no_grad()
def measure(policy: Policy, batch: Batch, team: Team = ALONE) -> Measured:
    """Evaluate policy and reference, in the microbatches that the update will use, each row at its exit layer.

    Every process evaluates its share and learns of all: what follows is computed by each of them, over the whole batch.

    Raises:
        ModelError: If a number is NaN or infinite.
    """
    shape = (len(batch.rows), max(len(response) for response in batch.responses))
    seen = torch.zeros(5, *shape, device=policy.vlm.device)
    logprobs, ref_logprobs, values, entropy, mask = seen

    def evaluate(passes: Passes) -> None:
        for microbatch, counts in passes:
            rows = [batch.rows[i] for i in microbatch]
            responses = [batch.responses[i] for i in microbatch]
            now = policy.evaluate(rows, responses)
            with policy.as_reference():
                reference = policy.evaluate(rows, responses)
            if not counts:
                continue
            width = now.mask.shape[1]
            logprobs[microbatch, :width] = now.logprobs
            ref_logprobs[microbatch, :width] = reference.logprobs
            values[microbatch, :width] = now.values
            entropy[microbatch, :width] = now.entropy
            mask[microbatch, :width] = now.mask.float()

    for index in range(len(batch.minibatches)):
        batch.in_passes(index, team, evaluate)
    logprobs, ref_logprobs, values, entropy, mask = team.sum(seen)  # of zeros and one process's number: exact
    mask = mask.bool()
    named = {"log-probabilities": logprobs, "the reference's log-probabilities": ref_logprobs, "values": values}
    for what, numbers in named.items():  # the same in every process, so that all stop
        check_finite(numbers, batch.rows, what=what, dtype=policy.vlm.base_model.dtype)
    return Measured(mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, entropy=entropy)


def token_rewards(measured: Measured, scores: Tensor, *, kl_coef: float) -> Tensor:
    """The KL penalty on every token and the score `(B,)` on the last, `(B, T)`."""
    mask = measured.mask
    return shaped_rewards(scores.to(mask.device), measured.logprobs, measured.ref_logprobs, mask, kl_coef=kl_coef)


def estimate_advantages(measured: Measured, rewards: Tensor, *, config: LPPOConfig) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and the returns that the value head learns, `(B, T)`."""
    advantages, returns = gae(rewards, measured.values, measured.mask, gamma=config.gamma, lam=config.lam)
    # Whitened over the whole batch, all exit layers together: an exit that does badly must push harder.
    return masked_whiten(advantages, measured.mask), returns


def compare_groups(measured: Measured, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """GRPO's advantages of scores `(B,)` in groups `(B,)`, not whitened, and returns of 0: no head learns them."""
    mask = measured.mask
    scores, groups = scores.to(mask.device), groups.to(mask.device)
    advantages = group_advantages(scores, groups, mask)
    return advantages, torch.zeros_like(advantages)
