"""What a reward is, alone or in a weighted sum; the score of an answer, its penalties, and the rewards of its tokens.

A reward is any callable `(samples, responses) -> list[float]`, in which NaN means *unscored*, or a judge. `scorer.py`
scores with them. A reward may score answers without an end, or gibberish, highly: penalties are subtracted for these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from exitsafe.errors import InputError
from exitsafe.judges import Judge
from exitsafe.judges.coherence import incoherence
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.rollout import Trajectory
from exitsafe.records import KINDS, Kind, Response, Sample

Reward = Callable[[Sequence[Sample], Sequence[Response]], list[float]]
BUILT_IN = "built-in"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward of a weighted sum.

    Args:
        reward: A callable, a judge, or None for the built-in reward.
        weight: Its score is multiplied by this.
        kinds: Kinds of samples that it scores.

    Raises:
        InputError: If the weight is 0 or not a number, or a kind is unknown.
    """

    reward: Reward | Judge | None = None
    weight: float = 1.0
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0.0:
            raise InputError(f"reward {self.label} has the weight {self.weight}: give a number other than 0")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(f"reward {self.label} is for no known kind of sample: choose from {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", tuple(kind for kind in KINDS if kind in self.kinds))

    @property
    def label(self) -> str:
        """The reward's name, and the kinds where they are not all."""
        name = BUILT_IN if self.reward is None else reward_name(self.reward)
        return name if self.kinds == KINDS else f"{name}@{','.join(self.kinds)}"


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """Several rewards, each with a weight and for some kinds of samples.

    An answer's score is the sum over the parts for its kind; it is unscored if one of these is.

    Raises:
        InputError: Without parts, or if two are the same reward for the same kinds.

    Examples:
        >>> always_right = Part(reward=lambda samples, responses: [1.0], kinds=("vqa",))
        >>> reward = WeightedSum(parts=(Part(weight=0.5), always_right))
        >>> [part.label for part in reward.parts]
        ['built-in', '<lambda>@vqa']
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("a weighted sum needs at least one part")
        label, count = Counter(part.label for part in self.parts).most_common(1)[0]
        if count > 1:
            raise InputError(f"reward {label} is given {count} times: give it once, with the sum of the weights")


def is_judge(reward: Reward | Judge) -> TypeGuard[Judge]:
    """Whether a reward is a judge, not a callable."""
    return hasattr(reward, "measures")


def reward_name(reward: Reward | Judge) -> str:
    """A judge's own name, or that of a function or class."""
    return reward.name if is_judge(reward) else str(getattr(reward, "__qualname__", type(reward).__qualname__))


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one answer, None if unscored, and what judges measured of it for constraints and metrics."""

    value: float | None
    attack_success: float | None = None
    refusal: float | None = None
    vqa_accuracy: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)  # raw scores by part of the reward


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with the form of an answer, regardless of its meaning."""

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
    """The answers of a step that have a score; all lists are in the same order."""

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
    """Scores to train on, `(B,)`: clipped first, then the penalties are subtracted."""
    final = torch.tensor(scores, dtype=torch.float32)
    if config.score_clip is not None:
        final = final.clamp(-config.score_clip, config.score_clip)
    return final - torch.tensor(penalties, dtype=torch.float32)
