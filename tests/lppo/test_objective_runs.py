"""Whole runs of each objective and sampler through the one loop: what is trained, logged, kept and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.errors import InputError
from exitsafe.lppo import align
from exitsafe.lppo.checkpoint import load_checkpoint
from exitsafe.lppo.constraints import Constraints
from exitsafe.records import Response, Sample, Verdict
from tests.lppo.conftest import CountRed, count_red, make_vlm, tiny_config
from tests.lppo.test_trainer import adapter_of, assert_same_run, interrupt, metrics_of, result_of

CPU = torch.device("cpu")
GRPO: dict[str, object] = {"method": "grpo", "group_size": 4, "max_new_tokens": 4}
CONSTRAINED: dict[str, object] = {
    "constraints": {"over_refusal": 0.01, "utility": 0.02},
    "constraint_samples": 20,
}


class Grumpy:
    """A judge with one thing on its mind: whether the word red is in an answer.

    Args:
        at: The call before which it is interrupted.
        wants_red: An answer with red is right, and an attack that succeeded; without, it is a refusal. Or the reverse.
        score_of_red: If given, also a reward for every answer with red.
    """

    def __init__(self, at: int = -1, *, wants_red: bool = True, score_of_red: float | None = None) -> None:
        self.name = "grumpy"
        self.count = CountRed(at, interrupt)
        self.wants_red = wants_red
        self.score_of_red = score_of_red
        self.measures = ("refusal", "vqa_accuracy", "asr", "coherence", *(() if score_of_red is None else ("reward",)))

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        verdicts = []
        for sample, response, count in zip(samples, responses, self.count(samples, responses), strict=True):
            is_liked = float((count > 0) == self.wants_red)
            scores = {"refusal": 1.0 - is_liked, "coherence": 1.0}
            scores |= {"asr": is_liked} if sample.kind == "harmful" else {}
            scores |= {"vqa_accuracy": is_liked} if sample.kind == "vqa" else {}
            scores |= {} if self.score_of_red is None else {"reward": self.score_of_red * min(count, 1.0)}
            verdicts += [
                Verdict(sample_id=sample.id, exit_layer=response.exit_layer, judge=self.name, measure=name, score=score)
                for name, score in scores.items()
            ]
        return verdicts


def run(samples: list[Sample], out: Path, reward: Any = count_red, **changes: object) -> list[dict[str, Any]]:
    align(make_vlm("llava"), samples, reward=reward, config=tiny_config(**changes), out=out)
    return metrics_of(out)


@pytest.mark.parametrize(
    "changes",
    [GRPO | CONSTRAINED, CONSTRAINED],
    ids=["constrained L-GRPO", "constrained L-PPO"],
)
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(
    samples: list[Sample], tmp_path: Path, changes: dict[str, object]
) -> None:
    run(samples, tmp_path / "whole", reward=Grumpy(), **changes)
    with pytest.raises(KeyboardInterrupt):  # three calls are for the untrained model's 20 answers
        run(samples, tmp_path / "broken", reward=Grumpy(3 + 3), **changes)
    assert len(metrics_of(tmp_path / "broken")) == 3
    run(samples, tmp_path / "broken", reward=Grumpy(), **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_grpo_trains_no_value_head_and_needs_no_warm_up(samples: list[Sample], tmp_path: Path) -> None:
    lines = run(samples, tmp_path / "run", **GRPO)
    for line in lines:
        for name in ("value_loss", "vf_clipfrac", "value_grad_norm", "explained_variance"):
            assert line[name] is None
        assert 0 <= line["num_equal_groups"] <= 2
        assert line["policy_loss"] is not None
    assert any(line["grad_norm"] > 0 for line in lines[:1])  # from the first step on
    found = load_checkpoint(tmp_path / "run" / "checkpoints", CPU)
    assert found is not None
    assert found[1]["value_optimizer"]["state"] == {}
    assert all((weight == 0).all() for weight in found[1]["value_head"].values())


def test_grpo_raises_the_reward(samples: list[Sample], tmp_path: Path) -> None:
    changes = GRPO | {"num_steps": 12, "batch_size": 32, "minibatch_size": 16, "microbatch_tokens": 1000}
    lines = run(samples, tmp_path / "run", **changes, learning_rate=1e-2)
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last > first + 0.5


def test_a_batch_of_equal_groups_moves_nothing_but_the_kl_term_does(samples: list[Sample], tmp_path: Path) -> None:
    def equal(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [1.0] * len(responses)

    still: dict[str, object] = {"missing_eos_penalty": 0.0, "incoherence_penalty": 0.0, "num_steps": 2}
    with pytest.warns(RuntimeWarning, match="nothing was learnt"):
        lines = run(samples, tmp_path / "run", reward=equal, **GRPO, **still)
    assert [line["num_equal_groups"] for line in lines] == [2, 2]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]  # the policy is the reference: k3's gradient is 0 too
    assert [line["kl"] for line in lines] == [0.0, 0.0]


@pytest.mark.parametrize("changes", [{}, GRPO], ids=["ppo", "grpo"])
def test_without_a_kl_penalty_the_divergence_is_still_logged(
    samples: list[Sample], tmp_path: Path, changes: dict[str, object]
) -> None:
    free = run(samples, tmp_path / "free", **changes, kl_coef=0.0)
    assert [line["kl_coef"] for line in free] == [0.0] * 4  # the adaptive coefficient stays at 0
    assert free[-1]["kl_per_token"] > 0
    assert free[-1]["kl"] != 0


@pytest.mark.parametrize("changes", [{}, GRPO], ids=["ppo", "grpo"])
def test_the_kl_penalty_holds_the_policy(samples: list[Sample], tmp_path: Path, changes: dict[str, object]) -> None:
    long = changes | {
        "num_steps": 8,
        "max_new_tokens": 3,
        "batch_size": 16,
        "minibatch_size": 16,
        "microbatch_tokens": 1000,
    }
    course = [
        run(samples, tmp_path / str(kl_coef), **long, kl_coef=kl_coef, kl_target=None, learning_rate=1e-2)
        for kl_coef in (0.0, 2.0)
    ]
    free, held = (sum(line["kl_per_token"] for line in lines[-3:]) for lines in course)
    assert held < 0.5 * free


def test_constraints_that_are_always_kept_change_nothing(samples: list[Sample], tmp_path: Path) -> None:
    """Refusals of this judge are rarer than the limit at every step, so the multiplier never leaves 0."""
    reward = Grumpy(wants_red=False)
    kept = run(samples, tmp_path / "kept", reward=reward, constraints={"over_refusal": 0.99}, num_steps=3)
    plain = run(samples, tmp_path / "plain", reward=reward, num_steps=3)
    for line in kept:
        assert line.pop("multipliers") == {"over_refusal": 0.0}
        assert line.pop("costs")["over_refusal"] < 0.99
    assert kept == plain
    one, other = adapter_of(tmp_path / "kept"), adapter_of(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_multipliers_follow_the_measured_costs_and_enter_the_score(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[dict[str, float]] = []
    original = Constraints.penalised

    def spy(self: Constraints, scores: torch.Tensor, costs: Any) -> torch.Tensor:
        used.append(dict(self.multipliers))
        return original(self, scores, costs)

    monkeypatch.setattr(Constraints, "penalised", spy)
    lines = run(samples, tmp_path / "run", reward=Grumpy(), **CONSTRAINED)
    limits = {"over_refusal": 0.01, "utility": 0.02}
    expected = dict.fromkeys(limits, 0.0)
    for line, in_force in zip(lines, used, strict=True):
        assert line["multipliers"] == in_force == pytest.approx(expected)
        for name, limit in limits.items():
            if line["costs"][name] is not None and line["step"] >= 1:  # no policy is trained at step 0
                expected[name] = max(0.0, expected[name] + line["costs"][name] - limit)
    assert lines[-1]["multipliers"]["over_refusal"] > 1  # nearly every answer is a refusal to this judge
    with pytest.raises(InputError, match="which answers were refusals or correct, and reward count_red"):
        run(samples, tmp_path / "none", **CONSTRAINED)
    assert not (tmp_path / "none").exists()


def test_a_constraint_turns_the_policy_away_from_its_cost(samples: list[Sample], tmp_path: Path) -> None:
    """The score wants the word red, the constraint sees a refusal in it: red becomes rare, whatever it earns."""
    long: dict[str, object] = {"num_steps": 16, "batch_size": 32, "minibatch_size": 16, "microbatch_tokens": 1000}
    long |= {"learning_rate": 1e-2, "mix": {"benign": 1.0}, "kl_coef": 0.0, "max_new_tokens": 3}
    long |= {"constraints": {"over_refusal": 0.05}, "constraint_rate": 4.0, "calibration_samples": 0}
    lines = run(samples, tmp_path / "run", reward=Grumpy(wants_red=False, score_of_red=1.0), **long)
    first, last = (sum(line["costs"]["over_refusal"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last < 0.5 * first
    assert max(line["multipliers"]["over_refusal"] for line in lines) > 1.0


def test_scores_that_differ_between_groups_alone_teach_grpo_nothing(samples: list[Sample], tmp_path: Path) -> None:
    def by_sample(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [float(sample.kind == "vqa") for sample in samples]

    with pytest.warns(RuntimeWarning, match="nothing was learnt: the final scores of every step were equal"):
        run(samples, tmp_path / "run", reward=by_sample, **GRPO, num_steps=2, missing_eos_penalty=0.0)
    result = result_of(tmp_path / "run")
    assert (result["learnt"], result["constant_steps"]) == (False, 2)
