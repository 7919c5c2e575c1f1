"""L-GRPO's loss: clipped surrogate plus k3 against the reference, no value loss; groups survive unscored answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import align
from exitsafe.lppo.advantage import group_advantages
from exitsafe.records import Response, Sample
from tests.lppo.conftest import tiny_config
from tests.lppo.test_update import SCORES, prepared, rng

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def test_the_gradient_is_that_of_the_plain_loss(
    vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, before the first step: -advantage * ratio + 0.3 * (ref / new - 1 - log(ref / new))."""
    config = tiny_config(
        method="grpo", group_size=4, minibatch_size=8, microbatch_tokens=30, num_epochs=1, max_grad_norm=1e9
    )
    with prepared(vlm, samples, config) as (policy, learner, experience):
        batch, measured = experience.batch, experience.measured
        experience = replace(experience, advantages=group_advantages(SCORES, GROUPS, measured.mask))
        rows = list(range(8))
        total, num_tokens = torch.zeros(()), 0
        for row in rows:
            now = policy.evaluate([batch.rows[row]], [batch.responses[row]])
            mine = SCORES[GROUPS[row] == GROUPS]
            for token in range(len(batch.responses[row])):
                logprob, ref = now.logprobs[0, token], measured.ref_logprobs[row, token]
                ratio = (logprob - logprob.detach()).exp()
                total = total - (SCORES[row] - mine.mean()) * ratio
                total = total + 0.3 * ((ref - logprob).exp() - 1 - (ref - logprob))
                num_tokens += 1
        expected = torch.autograd.grad(total / num_tokens, learner.weights)
        applied: list[list[torch.Tensor]] = []

        def keep() -> None:
            applied.append([weight.grad.clone() for weight in learner.weights if weight.grad is not None])

        monkeypatch.setattr(learner.optimizer, "step", keep)
        head = policy.value_head.weight.detach().clone()
        stats = learner.update(experience, train_policy=True, rng=rng(), kl_coef=0.3)
        assert torch.equal(policy.value_head.weight, head)
    assert len(applied) == 1
    assert len(applied[0]) == len(expected)
    for mine, wanted in zip(applied[0], expected, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-5)
    assert stats.grad_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in expected)), rel=1e-3)
    assert stats.value_loss is stats.vf_clipfrac is stats.value_grad_norm is None


def test_answers_stay_with_their_group_when_others_are_unscored(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(scores: torch.Tensor, groups: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(groups.tolist())
        return group_advantages(scores, groups, mask)

    def second_and_last_unscored(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [math.nan if place in (1, 7) else float(place) for place in range(len(responses))]

    monkeypatch.setattr("exitsafe.lppo.step.group_advantages", spy)
    config = tiny_config(method="grpo", group_size=4, num_steps=2)
    align(vlm, samples, reward=second_and_last_unscored, config=config, out=tmp_path / "run")
    assert seen == [[0, 0, 0, 1, 1, 1]] * 2
