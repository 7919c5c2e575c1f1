"""A batch of rollouts as tensors: log-probabilities, values, advantages. Trains nothing.

Rows and responses in, `(B, T)` tensors out, zero outside the mask. Knows nothing about samples, judges or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exitsafe.lppo.advantage import gae, group_advantages, masked_whiten
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.minibatches import Minibatch, share_out, split
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.policy import Policy, pack_size
from exitsafe.lppo.reward import shaped_rewards
from exitsafe.vlm import VLM, Row, sibling_groups
from exitsafe.vlm.finite import check_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Responses to rows, dealt into minibatches and microbatches."""

    rows: list[Row]
    responses: list[Tensor]  # token ids, (length,) each
    minibatches: list[Minibatch]
    shares: list[list[Minibatch]]  # of each minibatch, what each process evaluates; [] for a pass that does not count

    def passes(self, index: int, team: Team) -> list[tuple[list[int], bool]]:
        """This process's forward passes for minibatch `index`: the rows of each, and whether it counts.

        One that does not is of a row of the same minibatch: it reaches no weight that the others do not.
        """
        some_row = self.minibatches[index][0][:1]
        return [(microbatch or some_row, bool(microbatch)) for microbatch in self.shares[index][team.number]]

    def places(self, team: Team) -> list[int]:
        """The rows that this process evaluates."""
        numbers = range(len(self.minibatches))
        return [place for index in numbers for rows, _ in self.passes(index, team) for place in rows]


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
) -> Batch:
    """Split rows and their responses for the whole step; responses that are packed together stay together.

    The same minibatches whatever the team; only how they are cut hangs on its size.
    """
    sizes = [(len(row.prompt.input_ids), len(response)) for row, response in zip(rows, responses, strict=True)]
    minibatches = split(
        sizes,
        [vlm.batch_key(row.prompt) for row in rows],
        sibling_groups(rows, pack_size(vlm, config)),
        minibatch_size=config.minibatch_size,
        microbatch_tokens=config.microbatch_tokens,
        rng=rng,
        num_shares=team.size,
    )
    shares = [share_out(minibatch, sizes, team.size) for minibatch in minibatches]
    if team.is_sharded:  # all must do as many passes
        for among in shares:
            most = max(len(share) for share in among)
            among[:] = [share + [[]] * (most - len(share)) for share in among]
    return Batch(rows=list(rows), responses=list(responses), minibatches=minibatches, shares=shares)


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
    numbers = range(len(batch.minibatches))
    for microbatch, counts in (each for index in numbers for each in batch.passes(index, team)):
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
    logprobs, ref_logprobs, values, entropy, mask = team.sum(seen)  # of zeros and one process's number: exact
    mask = mask.bool()
    named = {"log-probabilities": logprobs, "the reference's log-probabilities": ref_logprobs, "values": values}
    for what, numbers in named.items():  # the same in every process, so that all stop
        check_finite(numbers, batch.rows, what=what, dtype=policy.vlm.base_model.dtype)
    return Measured(mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, entropy=entropy)


def token_rewards(measured: Measured, scores: Tensor, *, kl_coef: float, config: LPPOConfig) -> Tensor:
    """The KL penalty on every token and the score `(B,)` on the last, `(B, T)`."""
    mask = measured.mask
    rewards = shaped_rewards(scores.to(mask.device), measured.logprobs, measured.ref_logprobs, mask, kl_coef=kl_coef)
    return masked_whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards


def estimate_advantages(measured: Measured, rewards: Tensor, *, config: LPPOConfig) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and the returns that the value head learns, `(B, T)`."""
    advantages, returns = gae(rewards, measured.values, measured.mask, gamma=config.gamma, lam=config.lam)
    # Whitened over the whole batch, all exit layers together: an exit that does badly must push harder.
    return masked_whiten(advantages, measured.mask), returns


def compare_groups(measured: Measured, scores: Tensor, groups: Tensor, *, config: LPPOConfig) -> tuple[Tensor, Tensor]:
    """GRPO's advantages of scores `(B,)` in groups `(B,)`, not whitened, and returns of 0: no head learns them."""
    mask = measured.mask
    scores, groups = scores.to(mask.device), groups.to(mask.device)
    advantages = group_advantages(scores, groups, mask, scale_by_deviation=config.scale_by_deviation)
    return advantages, torch.zeros_like(advantages)
