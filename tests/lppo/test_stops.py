"""What stops a training: nothing learnt, a reward that never varies, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError, RunError
from exitsafe.lppo import LPPOConfig, align
from exitsafe.records import Response, Sample
from tests.judges.tiny_judges import rule_guard  # noqa: F401
from tests.lppo.conftest import count_red, tiny_config
from tests.lppo.test_trainer import metrics_of, result_of


def always_one(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    return [1.0] * len(responses)


def test_a_run_whose_minibatches_are_all_skipped_fails_and_keeps_its_checkpoints(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.lppo.update.MAX_RATIO", 0.5)  # the first ratio is 1
    config = tiny_config(num_steps=3)
    with pytest.raises(RunError, match="nothing was learnt: 12 of 12 minibatches were skipped"):
        align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_skips_everything_stops_before_its_end_also_when_resumed(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.lppo.update.MAX_RATIO", 0.5)
    monkeypatch.setattr("exitsafe.lppo.metrics.PATIENCE_STEPS", 5)
    config = tiny_config(num_steps=100, max_new_tokens=2, batch_size=2, minibatch_size=2, num_epochs=1)
    for _ in range(2):
        with pytest.raises(RunError, match=r"every minibatch of the last [56] steps was skipped"):
            align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) in (5, 6)


def test_a_reward_that_never_varies_stops_the_run(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.lppo.metrics.PATIENCE_STEPS", 3)
    monkeypatch.setattr("exitsafe.lppo.metrics.PATIENCE_ANSWERS", 32)
    config = tiny_config(num_steps=100, missing_eos_penalty=0.0)
    with pytest.raises(RunError, match="stopped after step 4 of 100: the final scores did not differ"):
        align(vlm, samples, reward=always_one, config=config, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("reward", "changes", "why"),
    [
        (always_one, {"missing_eos_penalty": 0.0}, "the final scores of every step were equal"),
        (count_red, {"learning_rate": 1e-60}, "weights are those it started with"),
    ],
    ids=["constant reward", "no weight moves"],
)
def test_a_short_run_says_that_nothing_was_learnt(
    vlm: VLM, samples: list[Sample], tmp_path: Path, reward: Any, changes: dict[str, Any], why: str
) -> None:
    with pytest.warns(RuntimeWarning, match=f"nothing was learnt: .*{why}"):
        align(vlm, samples, reward=reward, config=tiny_config(num_steps=2, **changes), out=tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert result["learnt"] is False
    assert why in result["why_not"]


@pytest.mark.parametrize(
    ("module", "what"), [("multi_modal_projector.linear_2", "image features"), ("language_model.norm", "logits")]
)
def test_numbers_that_are_not_finite_stop_the_training(
    vlm: VLM, samples: list[Sample], config: LPPOConfig, tmp_path: Path, module: str, what: str
) -> None:
    with torch.no_grad():
        next(vlm.model.model.get_submodule(module).parameters()).view(-1)[0] = torch.inf
    with pytest.raises(ModelError, match=rf"sample \S+ at exit \d: {what} are NaN or infinite in float32"):
        align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_log_probabilities_that_are_not_finite_stop_the_training(
    vlm: VLM, samples: list[Sample], config: LPPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation and teacher forcing run other kernels: one may overflow where the other does not."""
    states = VLM.response_states

    def overflowing(self: VLM, rows: Any, responses: Any) -> Any:
        hidden, tokens, mask = states(self, rows, responses)
        return hidden.index_fill(0, torch.tensor([0]), torch.inf), tokens, mask

    monkeypatch.setattr(VLM, "response_states", overflowing)
    with pytest.raises(ModelError, match=r"sample \S+ at exit \d: log-probabilities are NaN or infinite"):
        align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
