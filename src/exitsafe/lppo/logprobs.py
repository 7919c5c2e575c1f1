"""What the policy and its reference say of sampled answers: log-probabilities, values, entropy. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exitsafe.exits.finite import check_finite
from exitsafe.lppo.kl import k1
from exitsafe.lppo.minibatches import Batch, Passes
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.policy import Policy


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A batch under the policy that sampled it and under the reference, all `(B, T)` and zero outside the mask."""

    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor

    def nats_per_response(self) -> list[float]:
        """The divergence of each response from the reference, as k1."""
        nats: list[float] = k1(self.logprobs, self.ref_logprobs, self.mask).sum(dim=1).tolist()
        return nats


@torch.no_grad()
def measure(policy: Policy, batch: Batch, team: Team = ALONE) -> Measured:
    """Evaluate policy and reference, in the forward passes that the update will repeat, each row at its exit layer.

    Every process evaluates its share and receives those of the others: each continues with the whole batch.

    Raises:
        ModelError: If a number is NaN or infinite.
    """
    shape = (len(batch.rows), max(len(response) for response in batch.responses))
    found = torch.zeros(5, *shape, device=policy.vlm.device)
    logprobs, ref_logprobs, values, entropy, mask = found

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
    logprobs, ref_logprobs, values, entropy, mask = team.sum(found)  # zeros plus one process's number: exact
    named = {"log-probabilities": logprobs, "the reference's log-probabilities": ref_logprobs, "values": values}
    for what, numbers in named.items():  # the same in every process, so that all stop
        check_finite(numbers, batch.rows, what=what, dtype=policy.vlm.base_model.dtype)
    return Measured(mask=mask.bool(), logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, entropy=entropy)
