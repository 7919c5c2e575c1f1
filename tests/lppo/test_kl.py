"""KL estimates and the adaptive coefficient against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.kl import adapted_kl_coef, k1, k3

MASK = torch.tensor([[True, True, False]])


def test_k1_and_k3_by_hand() -> None:
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 1.0]]))
    ref_logprobs = torch.log(torch.tensor([[0.25, 0.5, 0.1]]))
    assert k1(logprobs, ref_logprobs, MASK).tolist() == [[pytest.approx(math.log(2)), pytest.approx(-math.log(2)), 0.0]]
    # exp(-log 2) - 1 + log 2 and exp(log 2) - 1 - log 2
    assert k3(logprobs, ref_logprobs, MASK).tolist() == [
        [pytest.approx(0.5 - 1 + math.log(2)), pytest.approx(2 - 1 - math.log(2)), 0.0]
    ]


def test_both_estimates_have_the_divergence_as_their_mean_and_k3_is_never_negative() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    mask = torch.ones(1, 3, dtype=torch.bool)
    divergence = (policy * (policy / reference).log()).sum().item()
    for estimate in (k1, k3):
        per_token = estimate(policy.log()[None], reference.log()[None], mask)[0]
        assert (policy * per_token).sum().item() == pytest.approx(divergence, abs=1e-6)
    assert (k3(policy.log()[None], reference.log()[None], mask) >= 0).all()
    assert (k1(policy.log()[None], reference.log()[None], mask) < 0).any()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target: no change
        (6.6, 0.1 * (1 + 0.1 / 5)),  # 10% above
        (60.0, 0.1 * (1 + 0.2 / 5)),  # far above: held at 20%
        (0.0, 0.1 * (1 - 0.2 / 5)),  # far below
    ],
)
def test_adapted_kl_coef_by_hand(kl: float, expected: float) -> None:
    adapted = adapted_kl_coef(0.1, kl, target=6.0, horizon=5, initial=0.1)
    assert adapted == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("kl", "after_35", "at_last"), [(7.5, 0.1, 0.5), (4.5, 0.0247, 0.005)])
def test_the_default_controller_can_act_within_a_run(kl: float, after_35: float, at_last: float) -> None:
    config, trace = LPPOConfig(), [LPPOConfig().kl_coef]
    assert config.kl_target is not None
    for _ in range(config.num_steps):
        trace.append(adapted_kl_coef(trace[-1], kl, target=config.kl_target, initial=config.kl_coef))
    assert trace[35] == pytest.approx(after_35, rel=0.01)  # twice or half of 0.05
    assert trace[-1] == pytest.approx(at_last)  # not further, or the way back would be as long


def test_a_coefficient_of_0_stays_there() -> None:
    assert adapted_kl_coef(0.0, 60.0, target=6.0, initial=0.0) == 0.0
