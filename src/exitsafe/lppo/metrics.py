"""The line that a training step leaves in metrics.jsonl, and the totals of a run. Tensors and records in, numbers out.

docs/lppo.md explains each name. Rates and means are over the answers that were scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import pstdev
from typing import Any

from torch import Tensor

from exitsafe.lppo.advantage import has_equal_scores
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.experience import Measured
from exitsafe.lppo.kl import k1, k3
from exitsafe.lppo.loss import masked_mean
from exitsafe.lppo.reward import Faults, Score
from exitsafe.lppo.rollout import Trajectory
from exitsafe.lppo.update import MAX_RATIO, UpdateStats
from exitsafe.machine.memory import MEASURED

NEVER_TWICE = ("seconds", *MEASURED)
"""What a run repeated bit for bit does not repeat; these names end a line."""
PATIENCE_STEPS = 20
"""A run stops after this many steps without anything to learn from: four times the value head's default warm-up. A step
whose minibatches are all skipped changes no weight, and the first ratio of a step is 1, so several in a row are not
chance."""
PATIENCE_ANSWERS = 500
"""Scores that never vary stop a run only after this many answers, as small batches need time to meet a rare success: by
the rule of three, fewer than 0.6% of the answers can then score differently (95%)."""


@dataclass(kw_only=True)
class Totals:
    """Totals over the steps of a run; kept in its checkpoints."""

    steps: int = 0
    answers: int = 0
    unscored_answers: int = 0
    minibatches: int = 0
    skipped_minibatches: int = 0
    constant_steps: int = 0
    """Steps whose final scores were all equal, or, compared in groups, equal in each group."""
    skipped_in_a_row: int = 0
    """How many of the latest steps in a row had all minibatches skipped."""

    def add(self, metrics: dict[str, Any], *, num_answers: int, is_constant: bool) -> None:
        """Count one step, from the line of its metrics."""
        self.steps += 1
        self.answers += num_answers
        self.unscored_answers += metrics["num_unscored"]
        self.minibatches += metrics["num_minibatches"]
        self.skipped_minibatches += metrics["skipped_minibatches"]
        self.constant_steps += is_constant
        is_skipped = metrics["skipped_minibatches"] == metrics["num_minibatches"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    @property
    def is_constant(self) -> bool:
        """Whether no step had scores to learn from."""
        return self.constant_steps == self.steps > 0

    def fault(self) -> str | None:
        """Why continuing is pointless, and what to do about it; None while training may still learn."""
        if self.skipped_in_a_row >= PATIENCE_STEPS:
            return f"every minibatch of the last {self.skipped_in_a_row} steps was skipped: {SKIPPED}"
        has_waited = self.steps >= PATIENCE_STEPS and self.answers - self.unscored_answers >= PATIENCE_ANSWERS
        if self.is_constant and has_waited:
            return f"the final scores did not differ in any of the first {self.steps} steps: {CONSTANT}"
        return None


SKIPPED = (
    f"ratios exceed {MAX_RATIO:g} or gradients are not finite; lower learning_rate, or load the model in bfloat16 or "
    "float32"
)
CONSTANT = (
    "check what the reward returns and final_score in metrics.jsonl; if share_clipped is 1, set calibration_samples; "
    "with grpo, raise group_size or temperature"
)


def step_metrics(
    trajectories: Sequence[Trajectory],
    scores: Sequence[Score],
    final: Tensor,
    faults: Sequence[Faults],
    measured: Measured,
    returns: Tensor,
    stats: UpdateStats,
    config: LPPOConfig,
) -> dict[str, Any]:
    """What happened in one step, over the whole batch, by kind of sample, by exit layer, and by both."""
    kinds = [trajectory.sample.kind for trajectory in trajectories]
    exits = [trajectory.row.exit_layer for trajectory in trajectories]
    values = [score.value for score in scores]
    attacks = [score.attack_success for score in scores]
    kl: list[float] = k1(measured.logprobs, measured.ref_logprobs, measured.mask).sum(dim=1).tolist()
    finals: list[float] = final.tolist()
    clip = config.score_clip
    both = [f"{kind}@{exit_layer}" for kind, exit_layer in zip(kinds, exits, strict=True)]
    per_token_kl = masked_mean(k3(measured.logprobs, measured.ref_logprobs, measured.mask), measured.mask)
    return {
        "reward": _mean(values),
        "reward_by_kind": _means(values, kinds),
        "reward_by_exit": _means(values, exits),
        "reward_by_kind_and_exit": _means(values, both),
        "reward_std": _deviation(values),
        "final_score": _mean(finals),
        "final_score_by_kind": _means(finals, kinds),
        "final_score_by_exit": _means(finals, exits),
        "final_score_by_kind_and_exit": _means(finals, both),
        "final_score_std": _deviation(finals),
        "share_clipped": _mean([float(clip is not None and abs(value or 0.0) > clip) for value in values]),
        "share_penalised": _mean([float(found.penalty(config) > 0) for found in faults]),
        "asr": _mean(attacks),
        "asr_by_exit": _means(attacks, exits),
        "kl": _mean(kl),
        "kl_by_exit": _means(kl, exits),
        "kl_per_token": per_token_kl.item(),
        "entropy": masked_mean(measured.entropy, measured.mask).item(),
        "explained_variance": explained_variance(measured.values, returns, measured.mask),
        **asdict(stats),
        "num_tokens": int(measured.mask.sum()),
        "num_cut": sum(trajectory.response.finish_reason == "length" for trajectory in trajectories),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - var(returns - values) / var(returns): 1 is a perfect value head, 0 one that knows only the mean."""
    variance = returns[mask].var(correction=0).item()
    if variance == 0.0:
        return None
    return 1.0 - (returns - values)[mask].var(correction=0).item() / variance


def num_equal_groups(scores: Tensor, groups: Tensor) -> int:
    """Groups without a gradient, because all their scores `(B,)` are equal."""
    return len(groups[has_equal_scores(scores, groups)].unique())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    """The population standard deviation, as in calibration."""
    known = [value for value in values if value is not None]
    return pstdev(known) if known else None


def _means(values: Sequence[float | None], groups: Sequence[str | int]) -> dict[str, float | None]:
    """Mean of each group that has a value, in the order of the groups' names or numbers."""
    members: dict[str | int, list[float | None]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            members.setdefault(group, []).append(value)
    return {str(group): _mean(members[group]) for group in sorted(members, key=lambda x: (str(type(x)), x))}
