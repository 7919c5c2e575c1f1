"""One step, as its update sees it: token rewards with the KL penalty, returns before whitening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import align
from exitsafe.lppo.update import Experience, Learner, UpdateStats
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, tiny_config


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gamma = lambda = 1 the return of a response's first token is its score less its KL penalty."""
    seen: list[tuple[Experience, list[float]]] = []
    update = Learner.update

    def spy(self: Learner, experience: Experience, **settings: Any) -> UpdateStats:
        responses = [response.tolist() for response in experience.batch.responses]
        texts = [str(self.policy.vlm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses]
        is_cut = [ids[-1] not in self.policy.vlm.eos_token_ids for ids in responses]
        scores = [text.split().count("red") - 1.0 * cut for text, cut in zip(texts, is_cut, strict=True)]
        seen.append((experience, scores))
        return update(self, experience, **settings)

    monkeypatch.setattr(Learner, "update", spy)
    config = tiny_config(gamma=1.0, lam=1.0, kl_coef=0.3, kl_target=None, learning_rate=3e-2)
    align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    penalties = []
    for experience, scores in seen:
        measured = experience.measured
        inside = experience.advantages[measured.mask]
        assert inside.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert inside.var(correction=0).item() == pytest.approx(1.0, abs=1e-3)
        penalty = 0.3 * (measured.logprobs - measured.ref_logprobs).sum(dim=1)
        torch.testing.assert_close(experience.returns[:, 0], torch.tensor(scores) - penalty, atol=1e-5, rtol=1e-5)
        penalties.append(penalty.abs().max().item())
    assert max(penalties) > 0.1
