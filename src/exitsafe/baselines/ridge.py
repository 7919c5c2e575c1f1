"""Ridge regression between the features of two exits, token by token: a linear map and its R².

Only sums of products are kept, in float64: a linear map, and its error on other tokens, depend on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exitsafe.exits.translators import Translator

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths to try, in units of each feature's variance: from almost none to halving the weight of a single feature."""


class Moments:
    """Sums over pairs of tokens x, y, both (width,): count, x, y, x'x, x'y and |y|².

    Args:
        width: Features of a token.
        device: Device of the sums.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.x, self.y, self.yy = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(3))
        self.xx, self.xy = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens x and y, (tokens, width) each, in the same order."""
        x, y = x.to(self.x), y.to(self.y)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.x), device=self.x.device)
        total.count = self.count + other.count
        for name in ("x", "y", "yy", "xx", "xy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y (width,), covariances xx and xy (width, width), and the variances of y (width,)."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        return (
            mean_x,
            mean_y,
            self.xx / self.count - mean_x.outer(mean_x),
            self.xy / self.count - mean_x.outer(mean_y),
            self.yy / self.count - mean_y.square(),
        )


def fit_map(moments: Moments, *, ridge: float) -> Translator:
    """The W, b that minimise mean |y - x W - b|² + ridge * sum_i var(x_i) |(W - I)_i|², in closed form.

    Two exits of one encoder share their residual stream, so the map shrinks to the identity instead of to 0, as with
    the tuned lens (Belrose et al. 2023, arXiv 2303.08112). In units of the features' variances, a strength means the
    same in every encoder. The intercept is not penalised.

    Args:
        moments: Sums over at least one token.
        ridge: Strength, above 0.

    Returns:
        float64 weight (width, width), as in a linear layer: W', and bias (width,).
    """
    mean_x, mean_y, cov_xx, cov_xy, _ = moments.centred()
    variances, squares = cov_xx.diagonal(), moments.xx.diagonal() / moments.count
    # the variance of a constant feature is only rounding, and must not decide anything
    scale = torch.where(variances > 1e-10 * squares, variances, squares + 1)
    change = torch.linalg.solve(cov_xx + torch.diag(ridge * scale), cov_xy - cov_xx)
    weight = torch.eye(len(mean_x)).to(change) + change
    return Translator(weight=weight.T, bias=mean_y - mean_x @ weight)


def r_squared(moments: Moments, translator: Translator) -> float:
    """1 - squared error / variance of y, both summed over the features, on the tokens of `moments`."""
    mean_x, mean_y, cov_xx, cov_xy, var_y = moments.centred()
    weight, bias = translator.weight.to(cov_xx).T, translator.bias.to(cov_xx)
    offset = mean_y - mean_x @ weight - bias
    error = var_y.sum() - 2 * (weight * cov_xy).sum() + (weight * (cov_xx @ weight)).sum() + offset.square().sum()
    return float(1 - error / var_y.sum())


def choose_ridge(fitted: Moments, held_out: Moments) -> tuple[float, float]:
    """The strength from `RIDGES` that explains held-out tokens best, and its R² there."""
    scores = {ridge: r_squared(held_out, fit_map(fitted, ridge=ridge)) for ridge in RIDGES}
    best = max(scores, key=lambda ridge: scores[ridge])
    return best, scores[best]
