"""What a training step leaves in metrics.jsonl and completions.jsonl, and the totals of a run.

docs/lppo.md explains each name. Rates and means are over the answers that were scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import pstdev

from torch import Tensor

from exitsafe.lppo.advantage import has_equal_scores
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.kl import k3
from exitsafe.lppo.logprobs import Measured
from exitsafe.lppo.loss import masked_mean
from exitsafe.lppo.reward import Score, ScoredAnswers
from exitsafe.lppo.rollout import Trajectory
from exitsafe.lppo.update import MAX_RATIO, UpdateStats
from exitsafe.machine.memory import MEASURED
from exitsafe.records import Kind

NEVER_TWICE = ("seconds", *MEASURED)
"""Differ between two runs that are otherwise equal bit for bit; these names end a line."""
PATIENCE_STEPS = 20
"""A run stops after this many steps from which nothing could be learnt: four times the value head's default warm-up. A
step whose minibatches are all skipped changes no weight, and the first ratio of a step is 1, so several in a row are
not chance."""
PATIENCE_ANSWERS = 500
"""Scores that never vary stop a run only after this many answers, as small batches need time to see a rare success: by
the rule of three, fewer than 0.6% of the answers can then score differently (95%)."""


Metric = float | None | Mapping[str, float | None]
Metrics = dict[str, Metric]
"""A step's line of metrics.jsonl: numbers, or numbers by kind, exit, part or constraint. None: not known."""


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

    def add(
        self,
        *,
        num_minibatches: int,
        num_skipped: int,
        num_answers: int = 0,
        num_unscored: int = 0,
        is_constant: bool = False,
    ) -> None:
        """Count one step."""
        self.steps += 1
        self.answers += num_answers
        self.unscored_answers += num_unscored
        self.minibatches += num_minibatches
        self.skipped_minibatches += num_skipped
        self.constant_steps += is_constant
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if num_skipped == num_minibatches else 0

    @property
    def is_constant(self) -> bool:
        """Whether no step had scores to learn from."""
        return self.constant_steps == self.steps > 0

    def fault(self) -> str | None:
        """Why continuing is pointless, and what to do about it; None while the policy may still learn."""
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
    scored: ScoredAnswers,
    final: Tensor,
    measured: Measured,
    returns: Tensor,
    stats: UpdateStats,
    *,
    config: LPPOConfig,
) -> Metrics:
    """What happened in one step, over the whole batch, by kind of sample, by exit layer, and by both."""
    kinds = [answer.sample.kind for answer in scored.answers]
    exits = [answer.row.exit_layer for answer in scored.answers]
    both = [f"{kind}@{exit_layer}" for kind, exit_layer in zip(kinds, exits, strict=True)]
    values, attacks = scored.values, [score.attack_success for score in scored.scores]
    finals: list[float] = final.tolist()
    nats = measured.nats_per_response()
    per_token_kl = masked_mean(k3(measured.logprobs, measured.ref_logprobs, measured.mask), measured.mask)
    clip = math.inf if config.score_clip is None else config.score_clip
    return {
        "reward": mean(values),
        "reward_by_kind": _means(values, kinds),
        "reward_by_exit": _means(values, exits),
        "reward_by_kind_and_exit": _means(values, both),
        "reward_std": pstdev(values),
        "final_score": mean(finals),
        "final_score_by_kind": _means(finals, kinds),
        "final_score_by_exit": _means(finals, exits),
        "final_score_by_kind_and_exit": _means(finals, both),
        "final_score_std": pstdev(finals),
        "share_clipped": mean([float(abs(value) > clip) for value in values]),
        "share_penalised": mean([float(faults.penalty(config) > 0) for faults in scored.faults]),
        "asr": _mean_of_known(attacks),
        "asr_by_exit": _means(attacks, exits),
        "kl": mean(nats),
        "kl_by_exit": _means(nats, exits),
        "kl_per_token": per_token_kl.item(),
        "entropy": masked_mean(measured.entropy, measured.mask).item(),
        "explained_variance": explained_variance(measured.values, returns, measured.mask),
        **asdict(stats),
        "num_tokens": int(measured.mask.sum()),
        "num_cut": sum(faults.is_cut for faults in scored.faults),
    }


def group_metrics(scores: Tensor, groups: Tensor) -> Metrics:
    """Of answers that are compared in groups, `(B,)` each: the groups without a gradient, as all their scores are
    equal."""
    return {"num_equal_groups": len(groups[has_equal_scores(scores, groups)].unique())}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A line of completions.jsonl."""

    step: int
    sample_id: str
    kind: Kind
    exit_layer: int
    text: str
    finish_reason: str
    num_tokens: int
    score: float | None
    final_score: float | None


def pick_completions(
    answers: Sequence[Trajectory],
    scores: Sequence[Score],
    finals: Mapping[int, float],
    *,
    step: int,
    config: LPPOConfig,
) -> list[Completion]:
    """Some answers of a step, evenly spaced over the batch, with their scores; `finals` by place. None at most steps,
    see `LPPOConfig.save_completions`."""
    if step % config.checkpoint_every and step + 1 < config.num_steps:
        return []
    num = min(config.save_completions, len(answers))
    picked = []
    for place in (number * len(answers) // num for number in range(num)):
        sample, response = answers[place].sample, answers[place].response
        picked.append(
            Completion(
                step=step,
                sample_id=sample.id,
                kind=sample.kind,
                exit_layer=response.exit_layer,
                text=response.text,
                finish_reason=response.finish_reason,
                num_tokens=response.num_tokens,
                score=scores[place].value,
                final_score=finals.get(place),
            )
        )
    return picked


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - var(returns - values) / var(returns): 1 is a perfect value head, 0 one that knows only the mean."""
    variance = returns[mask].var(correction=0).item()
    if variance == 0.0:
        return None
    return 1.0 - (returns - values)[mask].var(correction=0).item() / variance


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _means(values: Sequence[float | None], groups: Sequence[str | int]) -> dict[str, float | None]:
    """Mean of each group that has a value, in the order of the groups' names or numbers."""
    members: dict[str | int, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            members.setdefault(group, []).append(value)
    return {str(group): mean(members[group]) for group in sorted(members, key=lambda x: (str(type(x)), x))}
