"""The clipped losses against numbers worked by hand, slow plain loops, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from exitsafe.lppo import policy_loss, value_loss

Floats = st.floats(-1.5, 1.5, width=32)


def plain_policy_loss(new: list[float], old: list[float], adv: list[float], eps: float) -> tuple[float, float]:
    losses, clips = [], 0
    for n, o, a in zip(new, old, adv, strict=True):
        ratio = math.exp(n - o)
        held = min(max(ratio, 1 - eps), 1 + eps)
        losses.append(max(-a * ratio, -a * held))
        clips += -a * held > -a * ratio
    return sum(losses) / len(losses), clips / len(losses)


def plain_value_loss(new: list[float], old: list[float], ret: list[float], eps: float) -> tuple[float, float]:
    losses, clips = [], 0
    for n, o, r in zip(new, old, ret, strict=True):
        held = min(max(n, o - eps), o + eps)
        losses.append(max((n - r) ** 2, (held - r) ** 2))
        clips += (held - r) ** 2 > (n - r) ** 2
    return 0.5 * sum(losses) / len(losses), clips / len(losses)


def test_policy_loss_by_hand() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1 and clip 0.2:
    # max(-1.5, -1.2) = -1.2 (clipped); max(1.5, 1.2) = 1.5; max(-.5, -.8) = -.5; max(.5, .8) = .8 (clipped)
    logprobs = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]]))
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, clipfrac = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, clip_range=0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4, abs=1e-6)
    assert clipfrac.item() == 0.5


def test_the_upper_side_of_the_clip_may_be_higher() -> None:
    # as above, with clip 0.4 on the upper side: max(-1.5, -1.4) = -1.4; the lower side and its terms are as they were
    logprobs = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]]))
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, clip_range=0.2, clip_range_high=0.4)
    assert loss.item() == pytest.approx((-1.4 + 1.5 - 0.5 + 0.8) / 4, abs=1e-6)


def test_value_loss_by_hand() -> None:
    # v 1 held to 0.2 against return 1: max(0, .64); v -1 held to -.2, return 1: max(4, 1.44); v .1: (.9)^2 twice
    values = torch.tensor([[1.0, -1.0, 0.1, 77.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, clipfrac = value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask, clip_range=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 4.0 + 0.81) / 3, abs=1e-6)
    assert clipfrac.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("loss_function", "plain"), [(policy_loss, plain_policy_loss), (value_loss, plain_value_loss)])
@given(
    rows=st.lists(st.lists(st.tuples(Floats, Floats, Floats), min_size=1, max_size=5), min_size=1, max_size=4),
    eps=st.floats(0.05, 0.5),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_losses_equal_the_plain_loop_wherever_the_padding_is(
    loss_function: Callable[..., tuple[Tensor, Tensor]],
    plain: Callable[..., tuple[float, float]],
    rows: list[list[tuple[float, float, float]]],
    eps: float,
    left: int,
    right: int,
) -> None:
    width = left + max(len(row) for row in rows) + right
    tensors = torch.full((3, len(rows), width), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, left : left + len(row)] = True
        tensors[:, i, left : left + len(row)] = torch.tensor(row, dtype=torch.float64).T
    loss, clipfrac = loss_function(*tensors, mask, clip_range=eps)
    columns = [list(column) for column in zip(*(token for row in rows for token in row), strict=True)]
    expected_loss, expected_clipfrac = plain(*columns, eps)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert clipfrac.item() == pytest.approx(expected_clipfrac, abs=1e-6)


@pytest.mark.parametrize("loss_function", [policy_loss, value_loss])
def test_a_batch_is_the_token_weighted_sum_of_its_parts(
    loss_function: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[1], [5], [2], [4], [3], [5]])
    whole, _ = loss_function(*tensors, mask, clip_range=0.2)
    parts = [
        loss_function(*tensors[:, part], mask[part], clip_range=0.2)[0] * mask[part].sum() / mask.sum()
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("loss_function", [policy_loss, value_loss])
def test_gradients_equal_finite_differences_and_are_zero_outside_the_mask(
    loss_function: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, target = torch.randn(3, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: loss_function(x, old, target, mask, clip_range=0.2)[0], (new,), eps=1e-6, atol=1e-6
    )
    loss, _ = loss_function(new, old.fill_(math.nan).masked_fill(mask, 0.0), target, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.isfinite(loss)
    assert (gradient[~mask] == 0).all()


def test_ratio_of_one_gives_minus_the_mean_advantage_and_no_clipping() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, clipfrac = policy_loss(logprobs, logprobs, torch.tensor([[1.0, 2.0]]), mask, clip_range=0.2)
    assert loss.item() == -1.5
    assert clipfrac.item() == 0.0


def test_an_absurd_log_ratio_stays_finite() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(torch.tensor([[1000.0]]), torch.zeros(1, 1), torch.tensor([[-1.0]]), mask, clip_range=0.2)
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-5)
