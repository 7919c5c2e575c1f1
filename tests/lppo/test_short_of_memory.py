"""Training passes that run out of memory: smaller ones follow, the adapter is that of a run that began with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exitsafe.engine import generation
from exitsafe.engine.generation import Answer
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.lppo import align
from exitsafe.lppo.batch_sizes import BatchSizes
from exitsafe.lppo.parallel import this_team
from exitsafe.lppo.policy import Policy, PolicyOutput
from exitsafe.lppo.update import Learner
from tests.forks import together
from tests.lppo.conftest import CountRed, count_red, make_samples, make_vlm, tiny_config
from tests.lppo.test_trainer import assert_same_run, interrupt

WHOLE = 10_000
Adapter = Callable[..., dict[str, torch.Tensor]]


def train(vlm: VLM, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    config = tiny_config(num_steps=2, exit_layers=(2, 4), learning_rate=1e-2, **changes)
    align(vlm, make_samples(), reward=count_red, config=config, out=out)
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert all(one[name].abs().max() > 1e-3 for name in one if "lora_B" in name)  # they start at zero


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """The adapter of a run that began with small microbatches, by its other settings."""

    @cache
    def adapter(**changes: Any) -> dict[str, torch.Tensor]:
        return train(make_vlm("llava"), tmp_path_factory.mktemp("small"), microbatch_tokens=40, **changes)

    return adapter


def fail_over(monkeypatch: pytest.MonkeyPatch, most: int, *, backward: bool = False) -> list[int]:
    """No pass of more than so many rows; passes with gradient alone fail after some gradients are there."""
    evaluate, sizes = Policy.evaluate, list[int]()

    def short(self: Policy, rows: Sequence[Row], responses: Sequence[torch.Tensor]) -> PolicyOutput:
        sizes.append(len(rows))
        if not backward and len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        found = evaluate(self, rows, responses)
        if backward and len(rows) > most and found.logprobs.requires_grad:
            found.logprobs.register_hook(lambda gradient: run_out())
        return found

    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Policy, "evaluate", short)
    return sizes


@pytest.mark.parametrize(("backward", "group_size"), [(False, 4), (True, 1)])
def test_the_adapter_is_that_of_smaller_microbatches(
    vlm: VLM, small: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backward: bool, group_size: int
) -> None:
    expected = small(group_size=group_size)
    sizes = fail_over(monkeypatch, 2, backward=backward)
    with pytest.warns(RuntimeWarning, match="out of memory in step") as told:
        found = train(vlm, tmp_path / "halved", microbatch_tokens=WHOLE, group_size=group_size)
    assert_alike(found, expected)
    assert max(sizes) > 2
    lines = [str(each.message) for each in told if "out of memory" in str(each.message)]
    assert len(lines) == 1 and "microbatch_tokens is now" in lines[0]


def test_half_summed_gradients_are_dropped(
    vlm: VLM, small: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second pass of a minibatch, once."""
    expected = small(group_size=1)
    add_up, calls = Learner._add_up, list[int]()

    def short(self: Learner, passes: Any, *given: Any) -> Any:
        calls.append(len(passes))
        if len(calls) == 2:
            add_up(self, passes[:1], *given)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return add_up(self, passes, *given)

    monkeypatch.setattr(Learner, "_add_up", short)
    with pytest.warns(RuntimeWarning, match="microbatch_tokens is now"):
        assert_alike(train(vlm, tmp_path / "halved", microbatch_tokens=40), expected)
    assert calls[2] > calls[1]


def test_rollouts_take_fewer_rows(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(vlm, tmp_path / "whole")
    prefill, sizes = generation._prefill, list[int]()

    def short(vlm: VLM, answers: list[Answer], suppress: Sequence[int]) -> Any:
        sizes.append(len(answers))
        if len(answers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return prefill(vlm, answers, suppress)

    monkeypatch.setattr(generation, "_prefill", short)
    with pytest.warns(RuntimeWarning, match="step 0: rollout_batch_size is now 2,"):
        assert_alike(train(vlm, tmp_path / "halved", rollout_batch_size=8), expected)
    assert [size for size in sizes if size > 3] == sizes[:2]  # later steps begin with the smaller size


def test_a_resumed_run_starts_with_the_halved_sizes_and_ends_the_same(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(num_steps=4, microbatch_tokens=WHOLE, minibatch_size=8, checkpoint_every=2)

    def run(out: Path, interrupt_at: int = -1) -> list[int]:
        with monkeypatch.context() as patch:
            sizes = fail_over(patch, 4)
            align(vlm, make_samples(), reward=CountRed(interrupt_at, interrupt), config=config, out=out)
        return sizes

    with pytest.warns(RuntimeWarning, match="step 0: microbatch_tokens is now"):
        whole = run(tmp_path / "whole")
    with pytest.warns(RuntimeWarning, match="step 0: microbatch_tokens is now"), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", 3)
    resumed = run(tmp_path / "broken")
    assert max(resumed) < 8
    assert resumed == whole[-len(resumed) :]
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_size_that_the_settings_change_is_taken_from_them() -> None:
    before = BatchSizes(tiny_config(microbatch_tokens=64, rollout_batch_size=8))
    for size in (before.microbatch, before.rollout):
        size.most //= 2
    with pytest.warns(RuntimeWarning, match="rollout_batch_size is now 4 and microbatch_tokens is now 32"):
        before.agree(3)
    after = BatchSizes(tiny_config(microbatch_tokens=48, rollout_batch_size=8))
    after.load_state(before.state())
    assert (after.microbatch.most, after.rollout.most) == (48, 4)


def test_fine_tuning_halves_warns_and_resumes_alike(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(method="sft", microbatch_tokens=WHOLE, minibatch_size=8, refusal="red")

    def fine_tune(out: Path, stop_at: int = -1) -> list[int]:
        def stop(done: int, total: int, note: str) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            sizes = fail_over(patch, 4)
            align(vlm, make_samples(), config=config, out=out, progress=stop)
        return sizes

    with pytest.warns(RuntimeWarning, match="step 0: microbatch_tokens is now"):
        whole = fine_tune(tmp_path / "whole")
    with pytest.warns(RuntimeWarning, match="step 0: microbatch_tokens is now"), pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path / "broken", stop_at=3)
    resumed = fine_tune(tmp_path / "broken")
    assert max(resumed) < 8
    assert resumed == whole[-len(resumed) :]
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_what_does_not_fit_alone_is_one_line(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_over(monkeypatch, 0)
    with pytest.raises(RunError, match="out of memory in a training pass over a single answer: use fewer new tokens"):
        train(vlm, tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_process_of_two_runs_out(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on by itself, and from the next step on both cut as small as it."""
    settings = {"microbatch_tokens": WHOLE, "minibatch_size": 8}
    expected = train(vlm, tmp_path / "small", **settings | {"microbatch_tokens": 40})

    def work(number: int) -> None:
        sizes = fail_over(monkeypatch, 1 if number else 100)
        if number == 0:
            with pytest.warns(RuntimeWarning, match="microbatch_tokens is now"):
                train(vlm, tmp_path / "shared", **settings)
        else:
            train(vlm, tmp_path / "shared", **settings)
        assert max(sizes[:3]) > 1 and max(sizes[-3:]) == 1

    together(2, work)
    assert_alike(load_file(tmp_path / "shared" / "adapter" / "adapter_model.safetensors"), expected)


def test_sharded_processes_stop_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    team = this_team()
    team.is_sharded = True
    size = BatchSizes(tiny_config(microbatch_tokens=64), team).microbatch
    with pytest.raises(
        RunError, match=r"microbatch_tokens=64, and processes .* cannot halve it .* microbatch_tokens: 32"
    ):
        size.run(lambda size: _run_out())


def _run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
