"""The two clipped losses of PPO.

All tensors are `(B, T)`, `mask` is bool; nothing outside the mask is read. The losses are means over the masked tokens,
so the loss of a batch is the token-weighted sum of the losses of its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in float32: one extreme token cannot make the loss infinite


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7, as a loss to minimise).

    Args:
        logprobs: Under the policy being trained, with gradient, `(B, T)`.
        old_logprobs: Under the policy that sampled, the same over all epochs of a batch, `(B, T)`.
        advantages: Usually whitened, `(B, T)`.
        mask: True on response tokens, `(B, T)`.
        clip_range: The ratio is clipped to `[1 - clip_range, 1 + clip_range_high]`.
        clip_range_high: None is `clip_range`.

    Returns:
        The loss, and the share of tokens on which the clip acts (the clipped term is the larger one).
    """
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Half the larger of two squared errors: of the value, and of the value clipped to a range around the old one.

    Args:
        values: Of the head being trained, with gradient, `(B, T)`.
        old_values: Of the head when the batch was sampled, `(B, T)`.
        returns: The targets, `(B, T)`.
        mask: True on response tokens, `(B, T)`.
        clip_range: Values farther than this from the old ones are clipped in the second term.

    Returns:
        The loss, and the share of tokens on which the clip acts.
    """
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped = torch.where(mask, values - returns, 0.0).square()
    clipped = torch.where(mask, clipped_values - returns, 0.0).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(new / old) per token, clamped to +-20 and zero outside the mask, `(B, T)`."""
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the masked tokens, a scalar; 0 when there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
