"""How far the policy is from the reference, and the coefficient that holds it there. Numbers in, numbers out.

All tensors are `(B, T)`, `mask` is bool. The reward uses k1, which is unbiased; what is reported as the
divergence per token also has k3, which has the same mean, less noise and no negative values.
(Names after J. Schulman, "Approximating KL divergence", 2020.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, num_samples: int) -> float:
    """The KL coefficient for the next step (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Args:
        kl_coef: The coefficient of this step.
        kl: Measured divergence of a response from the reference, in nats, mean over the batch.
        target: The divergence to hold, in nats per response.
        horizon: Samples after which a persistent error of 20% or more has changed the coefficient by 20%.
        num_samples: Responses in this step.

    >>> round(adapted_kl_coef(0.1, 12.0, target=6.0, horizon=100, num_samples=50), 4)
    0.11
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)


def k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(policy / reference) of the sampled tokens: the unbiased estimate of the KL divergence, `(B, T)`."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: never negative, and unbiased too, `(B, T)`."""
    difference = k1(logprobs, ref_logprobs, mask).clamp(-20.0, 20.0)
    return torch.exp(-difference) - 1.0 + difference
