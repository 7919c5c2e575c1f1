"""The loop: every read at the sampled exit, exact resume, refused settings, a reward that rises."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exitsafe.engine.generation import Completion
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.exits.adapters import load_adapter, read_trained_on
from exitsafe.exits.features import Features, tensors_in
from exitsafe.lppo import LPPOConfig, align
from exitsafe.lppo.folder import read_lines
from exitsafe.lppo.metrics import NEVER_TWICE
from exitsafe.lppo.policy import attached_policy
from exitsafe.lppo.sampler import draw_schedule
from exitsafe.records import Response, Sample, Verdict
from exitsafe.store.fingerprint import request_digest
from tests.forks import fork, wait
from tests.judges.tiny_judges import rule_guard  # noqa: F401
from tests.lppo.conftest import CountRed, count_red, make_vlm, tiny_config
from tests.tiny_models import tiny_processor


def interrupt() -> None:
    raise KeyboardInterrupt


def metrics_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NEVER_TWICE} for line in lines]


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


def assert_same_run(first: Path, second: Path) -> None:
    one, other = adapter_of(first), adapter_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(first) == metrics_of(second)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    vlm: VLM, samples: list[Sample], tmp_path: Path, train: str
) -> None:
    config = tiny_config(train=train, feature_cache_gb=0.0 if train == "lora" else 1.0, microbatch_tokens=40)
    align(vlm, samples, reward=CountRed(), config=config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        align(vlm, samples, reward=CountRed(3, interrupt), config=config, out=tmp_path / "broken")
    assert len(metrics_of(tmp_path / "broken")) == 3  # one step past the checkpoint of step 2: to be redone
    assert not (tmp_path / "broken" / "adapter").exists()
    align(make_vlm("llava"), samples, reward=CountRed(), config=config, out=tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert result_of(tmp_path / "whole") == result_of(tmp_path / "broken")


def test_a_truncated_checkpoint_is_passed_over_and_the_run_ends_the_same(
    vlm: VLM, samples: list[Sample], whole_run: Path, tmp_path: Path
) -> None:
    config = tiny_config(checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        align(vlm, samples, reward=CountRed(3, interrupt), config=config, out=tmp_path / "broken")
    newest = tmp_path / "broken" / "checkpoints" / "step-000003.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="step-000003.ckpt is truncated or corrupt"):
        align(vlm, samples, reward=CountRed(), config=config, out=tmp_path / "broken")
    assert_same_run(whole_run, tmp_path / "broken")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_and_ends_the_same(
    vlm: VLM, samples: list[Sample], config: LPPOConfig, whole_run: Path, tmp_path: Path
) -> None:
    killed = fork(lambda: align(vlm, samples, reward=CountRed(3, kill), config=config, out=tmp_path))
    assert wait([killed]) == [-signal.SIGKILL]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    align(vlm, samples, reward=CountRed(), config=config, out=tmp_path)
    assert_same_run(whole_run, tmp_path)


def test_a_finished_run_started_again_is_done_and_changed_settings_are_refused(
    vlm: VLM, samples: list[Sample], config: LPPOConfig, whole_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "adapter"
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert align(vlm, samples, reward=CountRed(), config=config, out=tmp_path / "run") == path
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    for changed, difference in (
        ({"config": tiny_config(seed=3)}, "config.seed was 0, is now 3"),
        ({"samples": samples[:-1]}, "data.samples was 12, is now 11"),
        ({"reward": count_red}, 'reward was "CountRed", is now "count_red"'),
    ):
        arguments: dict[str, Any] = {"samples": samples, "reward": CountRed(), "config": config} | changed
        with pytest.raises(RunError, match=difference):
            align(vlm, arguments.pop("samples"), out=tmp_path / "run", **arguments)


def test_everything_reads_the_features_of_the_sampled_exit(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollout, old, reference, values and update: each row carries its own exit's features, mixed in a batch."""
    vlm = make_vlm("llava")
    reads: dict[str, list[tuple[str, int, int]]] = {"complete": [], "response_states": []}
    mixed_batches = 0
    right: dict[tuple[str, int], Features | None] = {}
    prompts = [vlm.encode_prompt(sample) for sample in samples]
    for prompt, found in zip(prompts, vlm.prompt_features(prompts, vlm.exit_layers), strict=True):
        right |= {(prompt.sample_id, exit_layer): features for exit_layer, features in found.items()}

    def check(rows: Sequence[Row], responses: Sequence[Sequence[int]], name: str) -> None:
        nonlocal mixed_batches
        mixed_batches += len({row.exit_layer for row in rows}) > 1
        for row, response in zip(rows, responses, strict=True):
            wanted = right[row.prompt.sample_id, row.exit_layer]
            assert (row.features is None) is (wanted is None)
            for mine, theirs in zip(tensors_in(row.features), tensors_in(wanted), strict=True):
                assert torch.allclose(mine, theirs, atol=1e-5)
            reads[name].append((row.prompt.sample_id, row.exit_layer, hash(tuple(response))))

    complete, response_states = VLM.complete, VLM.response_states

    def spy_complete(self: VLM, rows: Sequence[Row], **settings: Any) -> Iterator[tuple[int, Completion]]:
        for index, completion in complete(self, rows, **settings):
            check([rows[index]], [completion.token_ids], "complete")
            yield index, completion

    def spy_states(self: VLM, rows: Sequence[Row], responses: Sequence[torch.Tensor]) -> Any:
        check(rows, [response.tolist() for response in responses], "response_states")
        return response_states(self, rows, responses)

    monkeypatch.setattr(VLM, "complete", spy_complete)
    monkeypatch.setattr(VLM, "response_states", spy_states)
    config = tiny_config(num_steps=2, num_epochs=2, microbatch_tokens=10_000)
    align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    # each trajectory is read once by the policy, once by the reference, and once per epoch, at its one exit
    assert sorted(reads["response_states"]) == sorted(reads["complete"] * 4)
    assert len({exit_layer for _, exit_layer, _ in reads["complete"]}) >= 4
    assert mixed_batches >= 8


def test_features_are_computed_once(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, tuple[int, ...]]] = []
    original = VLM.prompt_features

    def spy(self: VLM, prompts: Sequence[Any], exit_layers: Sequence[int], **settings: Any) -> Any:
        calls.append((sum(bool(prompt.media) for prompt in prompts), tuple(exit_layers)))
        return original(self, prompts, exit_layers, **settings)

    monkeypatch.setattr(VLM, "prompt_features", spy)
    align(vlm, samples, reward=count_red, config=tiny_config(), out=tmp_path / "kept")
    assert sum(number for number, _ in calls) == 9
    assert {layers for _, layers in calls} == {(1, 2, 3, 4, 5, 6)}
    calls.clear()
    align(vlm, samples, reward=count_red, config=tiny_config(feature_cache_gb=0.0), out=tmp_path / "not")
    schedule = draw_schedule(samples, vlm.exit_layers, tiny_config())
    steps = zip(schedule.sample_indices.tolist(), schedule.exit_layers.tolist(), strict=True)
    drawn = [{(i, layer) for i, layer in zip(*step, strict=True) if samples[i].images} for step in steps]
    assert sum(number for number, _ in calls) == sum(map(len, drawn))  # every picture at an exit of a step once
    assert all(len(layers) == 1 for _, layers in calls)
    one, other = adapter_of(tmp_path / "kept"), adapter_of(tmp_path / "not")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_the_rollout_batch_size_changes_nothing(
    vlm: VLM, samples: list[Sample], whole_run: Path, tmp_path: Path
) -> None:
    align(vlm, samples, reward=count_red, config=tiny_config(rollout_batch_size=3), out=tmp_path)
    one, other = adapter_of(whole_run), adapter_of(tmp_path)  # whose batch is all 8 answers
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sample_that_comes_twice_in_a_step_is_drawn_twice(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    texts: list[str] = []

    def keep(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        texts.extend(response.text for response in responses)
        return [0.0] * len(responses)

    config = tiny_config(num_steps=2, exit_layers=(5,), missing_eos_penalty=0.0)
    with pytest.warns(RuntimeWarning, match="nothing was learnt"):
        align(vlm, samples[1:2], reward=keep, config=config, out=tmp_path / "run")
    assert len(set(texts)) > 8  # 16 answers to one sample at one exit


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reward_rises(samples: list[Sample], tmp_path: Path, train: str) -> None:
    vlm = make_vlm("llava")
    weights = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    rate = {"lora": 1e-2, "full": 3e-3}[train]
    config = tiny_config(
        train=train, num_steps=15, batch_size=32, minibatch_size=16, microbatch_tokens=1000, learning_rate=rate
    )
    seen: list[tuple[int, int]] = []
    align(
        vlm,
        samples,
        reward=count_red,
        config=config,
        out=tmp_path / "run",
        progress=lambda done, total, note: seen.append((done, total)),
    )
    metrics = metrics_of(tmp_path / "run")
    first = sum(line["reward"] for line in metrics[:3]) / 3
    last = sum(line["reward"] for line in metrics[-3:]) / 3
    assert last > first + 0.5
    assert metrics[0]["kl"] == 0.0  # the policy is the reference
    assert metrics[-1]["kl"] > 0.1
    assert seen == [(step, 15) for step in range(16)]
    assert vlm.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in vlm.model.state_dict().items())
    names = adapter_of(tmp_path / "run").keys()
    assert names
    assert all("language_model" in name or "lm_head" in name for name in names)


@pytest.mark.usefixtures("rule_guard")
def test_metrics_hold_every_layer_and_kind_and_the_adaptive_coefficient(
    vlm: VLM, samples: list[Sample], tmp_path: Path
) -> None:
    config = tiny_config(num_steps=3, batch_size=64, minibatch_size=64, exit_layers=(2, 4), kl_target=1.0)
    align(vlm, samples, reward=None, config=config, out=tmp_path / "run")
    metrics = metrics_of(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(3))
    for line in metrics:
        assert set(line["reward_by_kind"]) == {"harmful", "benign", "vqa"}
        assert list(line["reward_by_exit"]) == list(line["kl_by_exit"]) == ["2", "4", "5"]
        harmful = [name for name in line["reward_by_kind_and_exit"] if name.startswith("harmful@")]
        assert [f"harmful@{exit_layer}" for exit_layer in line["asr_by_exit"]] == harmful
        assert len(line["reward_by_kind_and_exit"]) >= 8
        assert 0.0 <= line["asr"] <= 1.0
        assert line["entropy"] > 0.0
        assert line["num_tokens"] >= 64
        assert line["skipped_minibatches"] == line["num_unscored"] == 0
    # the policy is the reference until the step after the value head's own: value_warmup_steps is 1
    assert metrics[0]["kl"] == metrics[1]["kl"] == 0.0 != metrics[2]["kl"]
    # KL 0 at first, target 1: after the warm-up, when the policy can answer to it, the coefficient falls by 20% / 10
    assert metrics[0]["kl_coef"] == metrics[1]["kl_coef"] == 0.05
    assert metrics[2]["kl_coef"] == pytest.approx(0.05 * 0.98)
    assert metrics[0]["learning_rate"] == pytest.approx(3e-3)
    assert metrics[2]["learning_rate"] == pytest.approx(3e-4)


def test_unscored_answers_are_left_out_and_counted(
    vlm: VLM, samples: list[Sample], config: LPPOConfig, tmp_path: Path
) -> None:
    def only_vqa(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [1.0 if sample.kind == "vqa" else float("nan") for sample in samples]

    def nothing(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [float("nan")] * len(responses)

    with pytest.warns(
        RuntimeWarning, match=r"nothing was learnt from those .*only_vqa: the reward returned NaN \(\d+\)"
    ):
        align(vlm, samples, reward=only_vqa, config=config, out=tmp_path / "run")
    for line in metrics_of(tmp_path / "run"):
        assert list(line["reward_by_kind"]) == ["vqa"]
        assert 4 <= line["num_unscored"] <= 7
    with pytest.raises(RunError, match=r"step 0: none of 8 answers could be scored \(.*NaN \(8\)\)"):
        align(vlm, samples, reward=nothing, config=config, out=tmp_path / "none")


def test_scores_are_calibrated_on_the_untrained_model(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    config = tiny_config(calibration_samples=30, num_steps=2)
    asked: list[int] = []

    def shifted(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        asked.append(len(responses))
        return [1000.0 + 100.0 * (response.exit_layer % 2) for response in responses]

    align(vlm, samples, reward=shifted, config=config, out=tmp_path / "run")
    assert asked == [30] + [8] * 2  # once, before the first step
    for line in metrics_of(tmp_path / "run"):
        (mean,) = line["reward_parts"].values()
        assert 1000 <= mean <= 1100
        assert abs(line["reward"]) < 2


def test_a_second_training_continues_the_adapter_of_the_first(
    samples: list[Sample], whole_run: Path, tmp_path: Path
) -> None:
    first = VLM(load_adapter(make_vlm("llava").model, whole_run / "adapter"), tiny_processor("llava"), name="llava")
    first.trained_on = read_trained_on(whole_run / "adapter")
    config = tiny_config(num_steps=2, clip_range_high=0.3)
    more = [replace(sample, id=f"more-{sample.id}", prompt=f"the {sample.prompt}") for sample in samples]
    adapter = align(first, more, reward=count_red, config=config, out=tmp_path / "second")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (whole_run / "adapter", adapter))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    (line, _) = read_lines(tmp_path / "second" / "metrics.jsonl")
    assert line["kl"] == 0.0  # the reference is the first training's adapter
    assert read_trained_on(adapter) == read_trained_on(whole_run / "adapter") | set(map(request_digest, more))
    from_base = replace(config, reference="base")
    align(first, more, reward=count_red, config=from_base, out=tmp_path / "from-base")
    assert read_lines(tmp_path / "from-base" / "metrics.jsonl")[0]["kl"] != 0.0


def test_bad_input_leaves_no_folder_behind(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exit_layer=9, but this encoder has 6 blocks: choose 1 to 6"):
        align(vlm, samples, config=tiny_config(exit_layers=(9,)), out=tmp_path / "run")
    with pytest.raises(InputError, match="no samples to train on"):
        align(vlm, [], config=tiny_config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_step_says_what_memory_it_took(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(range(100, 200))
    monkeypatch.setattr("exitsafe.machine.memory.Gauge.read", lambda gauge: {"peak_process_bytes": next(readings)})
    align(vlm, samples, reward=CountRed(), config=tiny_config(num_steps=3), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["peak_process_bytes"] for line in lines] == [100, 101, 102]


def test_a_healthy_run_says_what_it_skipped_and_could_not_score(whole_run: Path) -> None:
    result = result_of(whole_run)
    assert (result["learnt"], result["why_not"]) == (True, None)
    assert (result["minibatches"], result["skipped_minibatches"]) == (4 * 2 * 2, 0)
    assert (result["answers"], result["unscored_answers"]) == (32, 0)
    lines = metrics_of(whole_run)
    assert result["constant_steps"] == sum(line["final_score_std"] == 0 for line in lines) < 4


def test_the_line_of_a_step_tells_the_score_that_is_trained_on(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    def high(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [100.0 + (response.finish_reason == "length") for response in responses]

    config = tiny_config(num_steps=2, missing_eos_penalty=0.5)
    align(vlm, samples, reward=high, config=config, out=tmp_path / "run")
    for line in metrics_of(tmp_path / "run"):
        cut = line["num_cut"] / 8
        assert 0 < cut < 1
        assert line["reward"] == pytest.approx(100 + cut)
        assert line["reward_std"] == pytest.approx((cut * (1 - cut)) ** 0.5)
        assert line["final_score"] == pytest.approx(5 - 0.5 * cut)
        assert line["final_score_std"] == pytest.approx(0.5 * (cut * (1 - cut)) ** 0.5)
        assert (line["share_clipped"], line["share_penalised"]) == (1.0, cut)
        for by in ("kind", "exit", "kind_and_exit"):
            assert line[f"final_score_by_{by}"].keys() == line[f"reward_by_{by}"].keys()


class RewardModel:
    """A judge with an open scale: 100 and a little."""

    name = "reward:long"
    measures = ("reward",)

    def __init__(self, step: float = 1.0) -> None:
        self.step = step

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure="reward",
                score=100.0 + self.step * len(response.text),
            )
            for response in responses
        ]


def test_reward_models_are_calibrated_by_default_and_nothing_else_is(
    vlm: VLM, samples: list[Sample], tmp_path: Path
) -> None:
    align(vlm, samples, reward=RewardModel(), config=tiny_config(num_steps=2), out=tmp_path / "run")
    for line in metrics_of(tmp_path / "run"):
        assert line["reward_parts"]["reward:long"] > 100
        assert abs(line["reward"]) < 2
        assert line["final_score_std"] > 0.3
        assert line["share_clipped"] < 0.5
    asked: list[int] = []

    def count(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        asked.append(len(responses))
        return count_red(samples, responses)

    align(vlm, samples, reward=count, config=tiny_config(num_steps=2), out=tmp_path / "callable")
    assert asked == [8, 8]
    with pytest.raises(InputError, match="reward:long gave all 64 calibration answers the same score"):
        align(vlm, samples, reward=RewardModel(0.0), config=tiny_config(), out=tmp_path / "flat")


def test_the_kl_coefficient_moves_by_2_percent_a_step(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    config = tiny_config(kl_target=1000.0)  # never reached
    align(vlm, samples, reward=count_red, config=config, out=tmp_path / "run")
    assert metrics_of(tmp_path / "run")[-1]["kl_coef"] == pytest.approx(0.05 * 0.98**2)


def completions_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]


def test_completions_are_kept_on_request_and_a_resumed_run_has_none_twice(
    vlm: VLM, samples: list[Sample], tmp_path: Path
) -> None:
    def most(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        found = count_red(samples, responses)
        return [math.nan if i == 0 else score for i, score in enumerate(found)]

    config = tiny_config(save_completions=4, missing_eos_penalty=0.5)
    align(vlm, samples, reward=most, config=config, out=tmp_path / "whole")
    kept = completions_of(tmp_path / "whole")
    assert [row["step"] for row in kept] == [step for step in (0, 2, 3) for _ in range(4)]
    assert (tmp_path / "whole" / "completions.jsonl").stat().st_mode & 0o777 == 0o600
    assert {row["sample_id"] for row in kept} <= {sample.id for sample in samples}
    assert {row["exit_layer"] for row in kept} <= set(range(1, 7))
    for row in kept:
        if row["score"] is None:  # unscored ones are kept too
            assert row["final_score"] is None
        else:
            assert row["score"] == row["text"].split().count("red")
            assert row["final_score"] == row["score"] - 0.5 * (row["finish_reason"] == "length")
    assert any(row["score"] is None for row in kept)
    calls = iter(range(100))

    def breaking(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return most(samples, responses)

    breaking.__qualname__ = most.__qualname__
    with pytest.raises(KeyboardInterrupt):
        align(vlm, samples, reward=breaking, config=config, out=tmp_path / "broken")
    assert completions_of(tmp_path / "broken")[-1]["step"] == 2  # of the step that is done again
    align(vlm, samples, reward=most, config=config, out=tmp_path / "broken")
    assert completions_of(tmp_path / "broken") == kept
    assert not (tmp_path / "broken" / "completions.jsonl").stat().st_mode & 0o077


def test_no_completions_are_kept_unless_asked_for(whole_run: Path) -> None:
    assert not (whole_run / "completions.jsonl").exists()


def test_a_checkpoint_of_other_weights_is_refused(vlm: VLM, config: LPPOConfig) -> None:
    with attached_policy(vlm, config) as policy:
        weights = policy.weights()
        name = min(weights)
        for changed in ({**weights, name: weights[name][:1]}, {k: w for k, w in weights.items() if k != name}):
            with pytest.raises(ModelError, match="1 weights of the checkpoint do not belong to this adapter"):
                policy.load_weights(changed)
