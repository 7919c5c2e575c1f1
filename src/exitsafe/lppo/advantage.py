"""Advantages: GAE from token rewards and values, or scores compared in groups.

All tensors are `(B, T)`: one row per response, one column per response token; `mask` is bool and marks the
tokens that exist. Nothing outside the mask is read, and results are zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Args:
        rewards: Reward of each token, `(B, T)`.
        values: The value head's estimate before each token, `(B, T)`.
        mask: True on response tokens, `(B, T)`.
        gamma: Discount per token.
        lam: Weight of longer returns: 0 is one-step, 1 is Monte Carlo.

    Returns:
        Advantages, and returns = advantages + values, both `(B, T)` and not whitened.

    Examples:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
        (tensor([[0.5000, 0.7500]]), tensor([[1., 1.]]))
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # the value after the last token is 0: the answer ended there
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        is_token = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(is_token, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(is_token, values[:, t], next_value)
        advantages[:, t] = torch.where(is_token, next_advantage, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def group_advantages(scores: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """An answer's score minus the mean of its group, the same on each of its tokens (GRPO).

    Not divided by the deviation of the group, unlike in Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300): the division
    gives more weight to groups that nearly agree (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783).

    Args:
        scores: One per response, `(B,)`.
        groups: Index of each response's group, `(B,)` int; groups may differ in size.
        mask: True on response tokens, `(B, T)`.

    Returns:
        `(B, T)`; exactly zero where all scores of a group are equal, and for an answer without a group.

    Examples:
        >>> mask = torch.ones(3, 1, dtype=torch.bool)
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), mask)
        tensor([[ 0.5000],
                [-0.5000],
                [ 0.0000]])
    """
    is_member = groups[:, None] == groups[None, :]  # (B, B)
    share = is_member.to(scores.dtype) / is_member.sum(dim=1, keepdim=True)
    centred = scores - share @ scores
    centred = torch.where(has_equal_scores(scores, groups), 0.0, centred)  # the mean of equal numbers may be rounded
    return torch.where(mask, centred[:, None], 0.0)


def has_equal_scores(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether all scores in a response's group are equal, so that nothing can be learnt from it, `(B,)` bool."""
    is_other = (groups[:, None] == groups[None, :]) & (scores[:, None] != scores[None, :])
    return ~is_other.any(dim=1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over the masked tokens, and shift to mean 0 unless `shift_mean` is False.

    The variance is the population's (divided by the count). Advantages are shifted; rewards keep their mean,
    since their sign carries meaning.
    """
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / count
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / count
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)
