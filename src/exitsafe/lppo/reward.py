"""What a reward is, what faults of an answer's form cost, and scores with the KL penalty as rewards per token.

A reward is any callable `(samples, responses) -> list[float]`, in which NaN means *unscored*; judges, the built-in
reward and weighted sums are made into one in `scorer.py`. Answers without an end or gibberish can please a reward; a
penalty subtracted from the score keeps the policy from finding out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exitsafe.judges.coherence import incoherence
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.rollout import Trajectory
from exitsafe.records import Response, Sample

Reward = Callable[[Sequence[Sample], Sequence[Response]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one answer, None if unscored; and, where a judge says, what constraints and metrics read."""

    value: float | None
    attack_success: float | None = None
    refusal: float | None = None
    vqa_accuracy: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)  # by part of the reward, as the part gave it


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with the form of one answer, whatever it means."""

    is_cut: bool
    is_incoherent: bool

    def penalty(self, config: LPPOConfig) -> float:
        """What to subtract from the score; penalties add up."""
        return config.missing_eos_penalty * self.is_cut + config.incoherence_penalty * self.is_incoherent


def find_faults(responses: Sequence[Response]) -> list[Faults]:
    """The faults of each answer."""
    return [
        Faults(is_cut=response.finish_reason == "length", is_incoherent=incoherence(response.text) is not None)
        for response in responses
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredAnswers:
    """The answers of a step that have a score, and in the same order all that step 4 says of them."""

    answers: list[Trajectory]
    scores: list[Score]
    faults: list[Faults]
    places: list[int]  # in the batch as it was drawn

    @property
    def values(self) -> list[float]:
        """The scores as numbers."""
        return [score.value for score in self.scores if score.value is not None]


def shaped_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token: minus the KL penalty, and the score on the last token.

    Args:
        scores: One per response, `(B,)`.
        logprobs: Of the policy that sampled, `(B, T)`.
        ref_logprobs: Of the reference, at the same exit layer, `(B, T)`.
        mask: True on response tokens, `(B, T)`.
        kl_coef: Weight of log(policy / reference), in score per nat.

    Returns:
        `(B, T)`, zero outside the mask.

    Examples:
        >>> mask = torch.tensor([[True, True, False]])
        >>> logprobs, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-2.0, -2.0, 0.0]])
        >>> shaped_rewards(torch.tensor([3.0]), logprobs, ref, mask, kl_coef=0.5)
        tensor([[-0.5000,  3.0000,  0.0000]])
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)  # from the mask, never from values
    return rewards + torch.where(positions == last, scores[:, None], 0.0)


def final_scores(scores: Sequence[float], penalties: Sequence[float], *, config: LPPOConfig) -> Tensor:
    """Scores as the trainer uses them, `(B,)`: clipped, and only then less the penalties."""
    final = torch.tensor(scores, dtype=torch.float32)
    if config.score_clip is not None:
        final = final.clamp(-config.score_clip, config.score_clip)
    return final - torch.tensor(penalties, dtype=torch.float32)
