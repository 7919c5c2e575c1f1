"""The update: ratio 1 at first, parts equal the whole, gradients right, runaway batches skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig, gae, masked_whiten, policy_loss, shaped_rewards, update, value_loss
from exitsafe.lppo.logprobs import measure
from exitsafe.lppo.minibatches import deal
from exitsafe.lppo.policy import Policy, attached_policy
from exitsafe.lppo.update import Experience, Learner, UpdateStats
from exitsafe.records import Sample
from tests.lppo.conftest import tiny_config
from tests.lppo.test_policy import perturb, rows_at

EXITS = [1, 3, 5, 2, 6, 1, 4, 4]
SCORES = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0, 1.0, -1.0, 0.25])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@contextmanager
def prepared(vlm: VLM, samples: list[Sample], config: LPPOConfig) -> Iterator[tuple[Policy, Learner, Experience]]:
    """A policy somewhat away from its reference, with a batch of random answers."""
    generator = torch.Generator().manual_seed(3)
    responses = [torch.randint(9, 26, (1 + i % 5,), generator=generator) for i in range(8)]
    with attached_policy(vlm, config) as policy:
        perturb(policy)
        with torch.no_grad():
            policy.value_head.weight.fill_(0.01)
        batch = deal(vlm, rows_at(vlm, samples[:8], EXITS), responses, config=config, rng=rng())
        measured = measure(policy, batch)
        rewards = shaped_rewards(SCORES, measured.logprobs, measured.ref_logprobs, measured.mask, kl_coef=0.1)
        advantages, returns = gae(rewards, measured.values, measured.mask, gamma=config.gamma, lam=config.lam)
        advantages = masked_whiten(advantages, measured.mask)
        experience = Experience(batch=batch, measured=measured, advantages=advantages, returns=returns)
        yield policy, Learner(policy, config), experience


def weights_of(policy: Policy) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in policy.weights().values()])


def test_the_ratio_is_exactly_one_before_the_first_update(vlm: VLM, samples: list[Sample]) -> None:
    config = tiny_config(microbatch_tokens=40)
    with prepared(vlm, samples, config) as (policy, _, experience):
        batch, measured = experience.batch, experience.measured
        parts = [part for minibatch in batch.minibatches for part in minibatch]
        assert len(parts) > 2
        for part in parts:
            now = policy.evaluate([batch.rows[i] for i in part], [batch.responses[i] for i in part])
            width = now.mask.shape[1]
            assert now.logprobs.requires_grad
            assert torch.equal(now.logprobs.detach(), measured.logprobs[part, :width])
            assert torch.equal(now.values.detach(), measured.values[part, :width])
        assert (measured.logprobs - measured.ref_logprobs).abs().max() > 1e-3


def test_one_long_batch_equals_accumulated_parts(vlm: VLM, samples: list[Sample]) -> None:
    updated, stats = [], []
    for microbatch_tokens in (10_000, 25):
        config = tiny_config(microbatch_tokens=microbatch_tokens, minibatch_size=8, num_epochs=2)
        with prepared(vlm, samples, config) as (policy, learner, experience):
            batch = experience.batch
            parts = batch.minibatches[0]
            assert (len(parts) > 2) is (microbatch_tokens == 25)
            assert len({len(batch.responses[i]) for i in parts[0]} | {0}) > 1
            learner.set_learning_rates(0)
            stats.append(learner.update(experience, train_policy=True, rng=rng()))
            updated.append(torch.cat([weights_of(policy), policy.value_head.weight.detach().flatten()]))
    assert torch.allclose(updated[0], updated[1], atol=1e-5)
    for name in ("policy_loss", "value_loss", "ratio", "approx_kl", "clipfrac", "grad_norm"):
        whole, in_parts = getattr(stats[0], name), getattr(stats[1], name)
        assert in_parts == pytest.approx(whole, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("name", ["policy", "value head"])
def test_gradients_equal_finite_differences(vlm: VLM, samples: list[Sample], name: str) -> None:
    """Each loss along its own gradient, in float64 up to the logits; the value loss stops at the head."""
    vlm.model.double()
    config = tiny_config(minibatch_size=8, microbatch_tokens=10_000)
    with prepared(vlm, samples, config) as (policy, _, experience):
        batch, measured = experience.batch, experience.measured
        of = {"policy": policy.weights().values(), "value head": policy.value_head.parameters()}
        weights = list(of[name])

        def loss() -> torch.Tensor:
            (part,) = batch.minibatches[0]
            now = policy.evaluate([batch.rows[i] for i in part], [batch.responses[i] for i in part])
            old = measured.logprobs[part] + 0.01  # away from 1, where the clipped loss has a corner for some
            pg_loss, _ = policy_loss(now.logprobs, old, experience.advantages[part], now.mask, clip_range=0.2)
            old_values = measured.values[part] + 0.01
            vf_loss, _ = value_loss(now.values, old_values, experience.returns[part], now.mask, clip_range=0.2)
            return {"policy": pg_loss, "value head": vf_loss}[name]

        gradients = torch.autograd.grad(loss(), weights)
        slope = sum((gradient.double() ** 2).sum() for gradient in gradients)
        assert isinstance(slope, torch.Tensor)
        step = 1e-2 / slope.sqrt().item()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.add_(sign * step * gradient)
                ends.append(loss().item())
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.sub_(sign * step * gradient)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-2)


def test_old_log_probabilities_stay_fixed_over_the_epochs(vlm: VLM, samples: list[Sample]) -> None:
    with prepared(vlm, samples, tiny_config(minibatch_size=8, num_epochs=1)) as run:
        _, learner, experience = run
        learner.set_learning_rates(0)
        first = learner.update(experience, train_policy=True, rng=rng())
        second = learner.update(experience, train_policy=True, rng=rng())
    assert first.ratio == pytest.approx(1.0, abs=1e-6)
    assert first.approx_kl == pytest.approx(0.0, abs=1e-9)
    assert first.clipfrac == 0.0
    assert second.approx_kl is not None
    assert second.approx_kl > 1e-6


def test_a_value_only_step_leaves_the_policy_alone(vlm: VLM, samples: list[Sample]) -> None:
    with prepared(vlm, samples, tiny_config()) as (policy, learner, experience):
        learner.set_learning_rates(0)
        before, head = weights_of(policy), policy.value_head.weight.detach().clone()
        learner.update(experience, train_policy=False, rng=rng())
        assert torch.equal(weights_of(policy), before)
        assert not torch.equal(policy.value_head.weight, head)
        learner.update(experience, train_policy=True, rng=rng())
        assert not torch.equal(weights_of(policy), before)


def test_the_value_loss_weighs_as_much_as_its_coefficient(
    vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for value_coef in (0.1, 1.0):
        monkeypatch.setattr(update, "VALUE_COEF", value_coef)
        config = tiny_config(minibatch_size=8, max_grad_norm=1e9)
        with prepared(vlm, samples, config) as (_, learner, experience):
            learner._accumulate(experience, 0, False, 0.0)
            gradients.append(torch.cat([weight.grad.flatten() for weight in learner.head_weights]))  # type: ignore[union-attr]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0] * 10, gradients[1])


def test_the_value_head_learns_the_returns(vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "VALUE_CLIP_RANGE", 100.0)
    config = tiny_config(num_epochs=20)
    with prepared(vlm, samples, config) as (_, learner, experience):
        learner.set_learning_rates(0)
        first = learner.update(experience, train_policy=False, rng=rng())
        second = learner.update(experience, train_policy=False, rng=rng())
    assert first.value_loss is not None
    assert second.value_loss is not None
    assert second.value_loss < 0.8 * first.value_loss


@pytest.mark.parametrize("poison", ["ratio", "nan"])
def test_a_runaway_minibatch_is_skipped_and_counted(vlm: VLM, samples: list[Sample], poison: str) -> None:
    config = tiny_config(num_epochs=1)
    with prepared(vlm, samples, config) as (policy, learner, experience):
        learner.set_learning_rates(0)
        before, head = weights_of(policy), policy.value_head.weight.detach().clone()
        if poison == "ratio":
            measured = experience.measured
            experience = replace(experience, measured=replace(measured, logprobs=measured.logprobs - 5.0))
        else:
            experience = replace(experience, advantages=torch.full_like(experience.advantages, torch.nan))
        stats = learner.update(experience, train_policy=True, rng=rng())
        assert stats == UpdateStats(
            policy_loss=None,
            value_loss=None,
            ratio=None,
            approx_kl=None,
            clipfrac=None,
            vf_clipfrac=None,
            grad_norm=None,
            value_grad_norm=None,
            num_minibatches=2,
            skipped_minibatches=2,
        )
        assert torch.equal(weights_of(policy), before)
        assert torch.equal(policy.value_head.weight, head)


def test_gradients_are_clipped(vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(max_grad_norm=1e-3)
    with prepared(vlm, samples, config) as (_, learner, experience):
        applied: list[float] = []

        def spy() -> None:
            gradients = [weight.grad for weight in learner.weights if weight.grad is not None]
            applied.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

        monkeypatch.setattr(learner.optimizer, "step", spy)
        stats = learner.update(experience, train_policy=True, rng=rng())
    assert stats.grad_norm is not None
    assert stats.grad_norm > 1e-2
    assert applied == [pytest.approx(1e-3, rel=1e-2)] * 4


def test_learning_rates_fall_linearly_to_their_final_share(vlm: VLM) -> None:
    config = tiny_config(num_steps=11, learning_rate=1.0, value_learning_rate=10.0, final_lr_fraction=0.1)
    with attached_policy(vlm, config) as policy:
        learner = Learner(policy, config)
        assert learner.set_learning_rates(0) == (1.0, 10.0)
        assert list(learner.set_learning_rates(5)) == pytest.approx([0.55, 5.5])
        assert list(learner.set_learning_rates(10)) == pytest.approx([0.1, 1.0])
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
        assert learner.value_optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
