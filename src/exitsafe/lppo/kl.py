"""The divergence of the policy from the reference, and the adaptive coefficient of its penalty.

All tensors are `(B, T)`, `mask` is bool. The reward uses k1, which is unbiased. The divergence per token is reported as
k3, which has the same mean, less noise and no negative values. (Names after J. Schulman, "Approximating KL divergence",
2020.)
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_COEF_RANGE = 10.0
"""The adaptive coefficient stays within this factor of its initial value. Otherwise a run that spends a long time below
the target would take just as long to restore the penalty."""
KL_HORIZON = 10
"""2% a step (Ziegler et al.), so that a persistent error doubles the coefficient within 35 steps."""


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, initial: float, horizon: int = KL_HORIZON) -> float:
    """The KL coefficient for the next step (Ziegler et al. 2019, arXiv 1909.08593, section 2.2; 1 / horizon is their
    K_beta).

    Args:
        kl_coef: The coefficient of this step.
        kl: Measured divergence of a response from the reference, in nats, mean over the batch.
        target: The divergence to hold, in nats per response.
        initial: The coefficient of the first step, which bounds it by `KL_COEF_RANGE`.
        horizon: Steps in which a persistent error of 20% or more changes the coefficient by 20%.

    >>> round(adapted_kl_coef(0.1, 12.0, target=6.0, initial=0.1), 4)
    0.102
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    adapted = kl_coef * (1.0 + error / horizon)
    return min(max(adapted, initial / KL_COEF_RANGE), initial * KL_COEF_RANGE)


def k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(policy / reference) of the sampled tokens: the unbiased estimate of the KL divergence, `(B, T)`."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: never negative, and unbiased too, `(B, T)`."""
    difference = k1(logprobs, ref_logprobs, mask).clamp(-20.0, 20.0)
    return torch.exp(-difference) - 1.0 + difference
