"""The update of L-PPO: several epochs of the two clipped losses over one batch, shared by all processes.

Tensors in, statistics out; the policy and its value head change in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.kl import k3
from exitsafe.lppo.logprobs import Measured
from exitsafe.lppo.loss import log_ratio, masked_mean, policy_loss, value_loss
from exitsafe.lppo.minibatches import Batch, Passes
from exitsafe.lppo.parallel import ALONE, Team
from exitsafe.lppo.policy import Policy, PolicyOutput

VALUE_CLIP_RANGE = 0.2
"""As `clip_range` (TRL)."""
VALUE_COEF = 0.1
"""Weight of the value loss (TRL). The losses share no weights: it only sets where the head's gradient is clipped."""
MAX_RATIO = 10.0
"""A minibatch whose mean ratio exceeds this is skipped and counted (TRL's `ratio_threshold`)."""
_TOTALS = ("policy_loss", "value_loss", "ratio", "approx_kl", "clipfrac", "vf_clipfrac")


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """What an update learns from."""

    batch: Batch
    measured: Measured  # before any update
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T), what the value head learns


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """Means over the optimiser steps of one update that were not skipped; None where all were, or without a critic."""

    policy_loss: float | None
    value_loss: float | None
    ratio: float | None
    approx_kl: float | None
    clipfrac: float | None
    vf_clipfrac: float | None
    grad_norm: float | None
    value_grad_norm: float | None
    num_minibatches: int
    skipped_minibatches: int


class Learner:
    """The policy with its optimisers. The value head has its own, because the two losses differ in scale."""

    def __init__(self, policy: Policy, config: LPPOConfig, team: Team = ALONE) -> None:
        self.policy = policy
        self.config = config
        self.team = team
        self.has_critic = config.method == "lppo"
        self.weights = list(policy.weights().values())
        self.head_weights = list(policy.value_head.parameters())
        self.optimizer: Optimizer = AdamW(self.weights, eps=1e-5, weight_decay=0.0)  # PPO's usual eps
        self.value_optimizer: Optimizer = AdamW(self.head_weights, eps=1e-5, weight_decay=0.0)

    def update(
        self, experience: Experience, *, train_policy: bool, rng: np.random.Generator, kl_coef: float = 0.0
    ) -> UpdateStats:
        """All epochs over one batch; the old log-probabilities and values stay fixed throughout.

        Args:
            experience: What to learn from.
            train_policy: False trains the value head alone.
            rng: Orders the minibatches of each epoch.
            kl_coef: Weight of the divergence from the reference in the loss; PPO has it in the rewards instead.
        """
        done: list[dict[str, float]] = []
        for _ in range(self.config.num_epochs):
            for index in rng.permutation(len(experience.batch.minibatches)):
                stats = self._accumulate(experience, int(index), train_policy, kl_coef)
                done.append(stats | self._step(stats["ratio"], train_policy))
        return _summary(done, has_critic=self.has_critic)

    def set_learning_rates(self, step: int) -> tuple[float, float]:
        """Linear decay: the full rates at step 0, `final_lr_fraction` of them at the last step."""
        config = self.config
        factor = 1.0 - (1.0 - config.final_lr_fraction) * step / max(config.num_steps - 1, 1)
        rates = (config.learning_rate * factor, config.value_learning_rate * factor)
        for optimizer, rate in zip((self.optimizer, self.value_optimizer), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rates

    def _accumulate(self, experience: Experience, index: int, train_policy: bool, kl_coef: float) -> dict[str, float]:
        """Accumulate the gradients of a minibatch's parts, each weighted by its share of the tokens of all processes.

        When memory runs out, the gradients so far are dropped and smaller parts start over: the sum is the same.
        """

        def add_up(passes: Passes) -> dict[str, float]:
            self.drop_gradients()
            return self._add_up(passes, experience, index, train_policy, kl_coef)

        totals = experience.batch.in_passes(index, self.team, add_up)
        self.team.sum_gradients([*self.head_weights, *(self.weights if train_policy else ())])
        summed = self.team.sum(torch.tensor(list(totals.values()), dtype=torch.float64))
        return dict(zip(totals, summed.tolist(), strict=True))

    def _add_up(
        self, passes: Passes, experience: Experience, index: int, train_policy: bool, kl_coef: float
    ) -> dict[str, float]:
        """Forward and backward passes of this process; returns its share of the statistics."""
        batch = experience.batch
        num_tokens = sum(len(batch.responses[i]) for part in batch.minibatches[index] for i in part)
        totals = dict.fromkeys(_TOTALS, 0.0)
        for part, counts in passes:
            now = self.policy.evaluate([batch.rows[i] for i in part], [batch.responses[i] for i in part])
            loss, stats = self._loss(now, part, experience, train_policy, kl_coef)
            share = now.mask.sum() / num_tokens * counts
            (share * loss).backward()
            for name, value in stats.items():
                totals[name] += (share * value.detach()).item()
        return totals

    def _loss(
        self, now: PolicyOutput, part: list[int], experience: Experience, train_policy: bool, kl_coef: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What one forward pass over the rows `part` minimises, and the statistics of `_TOTALS`."""
        measured, mask = experience.measured, now.mask
        here = part, slice(mask.shape[1])
        old_logprobs = measured.logprobs[here]
        pg_loss, clipfrac = policy_loss(
            now.logprobs,
            old_logprobs,
            experience.advantages[here],
            mask,
            clip_range=self.config.clip_range,
            clip_range_high=self.config.clip_range_high,
        )
        vf_loss, vf_clipfrac = value_loss(
            now.values, measured.values[here], experience.returns[here], mask, clip_range=VALUE_CLIP_RANGE
        )
        loss = pg_loss if train_policy else torch.zeros_like(pg_loss)
        if self.has_critic:
            loss = VALUE_COEF * vf_loss + loss
        if kl_coef > 0:
            loss = loss + kl_coef * masked_mean(k3(now.logprobs, measured.ref_logprobs[here], mask), mask)
        logprobs = now.logprobs.detach()
        return loss, {
            "policy_loss": pg_loss,
            "value_loss": vf_loss,
            "ratio": masked_mean(log_ratio(logprobs, old_logprobs, mask).exp(), mask),
            "approx_kl": masked_mean(k3(old_logprobs, logprobs, mask), mask),
            "clipfrac": clipfrac,
            "vf_clipfrac": vf_clipfrac,
        }

    def _step(self, ratio: float, train_policy: bool) -> dict[str, float]:
        """Clip and apply the gradients, unless the policy has diverged from the one that sampled."""
        limit = self.config.max_grad_norm
        value_grad_norm = torch.nn.utils.clip_grad_norm_(self.head_weights, limit).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, limit).item() if train_policy else 0.0
        is_sane = ratio <= MAX_RATIO and math.isfinite(grad_norm) and math.isfinite(value_grad_norm)
        if is_sane:
            self.value_optimizer.step()
            if train_policy:
                self.optimizer.step()
        self.drop_gradients()
        return {"grad_norm": grad_norm, "value_grad_norm": value_grad_norm, "is_skipped": float(not is_sane)}

    def drop_gradients(self) -> None:
        """Drop the accumulated gradients."""
        self.value_optimizer.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)


def _summary(done: Sequence[dict[str, float]], *, has_critic: bool) -> UpdateStats:
    kept = [stats for stats in done if not stats["is_skipped"]]

    def mean(name: str) -> float | None:
        return sum(stats[name] for stats in kept) / len(kept) if kept else None

    return UpdateStats(
        policy_loss=mean("policy_loss"),
        value_loss=mean("value_loss") if has_critic else None,
        ratio=mean("ratio"),
        approx_kl=mean("approx_kl"),
        clipfrac=mean("clipfrac"),
        vf_clipfrac=mean("vf_clipfrac") if has_critic else None,
        grad_norm=mean("grad_norm"),
        value_grad_norm=mean("value_grad_norm") if has_critic else None,
        num_minibatches=len(done),
        skipped_minibatches=len(done) - len(kept),
    )
