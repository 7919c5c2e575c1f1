"""One run in several processes: the same curves and adapter, whole groups, one decision, no hanging."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.lppo import Evaluation, align, gae, keep_apart, masked_whiten, shaped_rewards
from exitsafe.lppo.logprobs import Measured, measure
from exitsafe.lppo.metrics import NEVER_TWICE
from exitsafe.lppo.minibatches import Batch, share_out, split
from exitsafe.lppo.parallel import Team, this_team
from exitsafe.lppo.policy import PolicyOutput
from exitsafe.lppo.reward import Reward
from exitsafe.machine.memory import BatchSize
from exitsafe.records import Response, Sample
from tests.cli.conftest import write_suite
from tests.forks import start, together, wait
from tests.lppo.conftest import count_red, make_samples, tiny_config
from tests.lppo.test_training_killed import Fickle
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def picky(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    """Counts red, and leaves some answers unscored."""
    found = count_red(samples, responses)
    return [
        math.nan if zlib.crc32(response.text.encode()) % 4 == 0 else value + 0.1 * response.num_tokens
        for response, value in zip(responses, found, strict=True)
    ]


def curve(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def numbers(line: Any, name: str = "") -> dict[str, float]:
    """All numbers of a line by their path, the time aside."""
    if isinstance(line, dict):
        return {
            path: x
            for key, value in line.items()
            if key not in NEVER_TWICE
            for path, x in numbers(value, f"{name}/{key}").items()
        }
    return {} if line is None else {name: float(line)}


def assert_alike(one: Path, other: Path) -> None:
    """Equal loss curves and adapters to the tolerance of float32."""
    first, second = curve(one), curve(other)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-3, abs=1e-5), a["step"]
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    trained = [name for name in mine if "lora_B" in name]
    assert all(mine[name].abs().max() > 1e-3 for name in trained)  # they start at zero
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)


SETTINGS: dict[str, dict[str, Any]] = {
    # everything that a step passes on to the next
    "ppo": {
        "kl_target": 0.01, "calibration_samples": 8,
    },
    # two groups for three processes: one has nothing to answer
    "grpo": {"method": "grpo", "group_size": 4, "num_steps": 2, "feature_cache_gb": 0.0, "minibatch_size": 8},
    # the samples without a reference are answered by the processes in turn
    "sft": {"method": "sft", "refusal": "not now", "num_steps": 3, "feature_cache_gb": 0.0, "learning_rate": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize(("name", "reward", "num_processes"), [("ppo", picky, 2), ("grpo", picky, 3), ("sft", None, 2)])
def test_processes_and_accumulation_change_no_curve(
    vlm: VLM, tmp_path: Path, name: str, reward: Reward | None, num_processes: int
) -> None:
    """1 process x 8 = 2 processes x 4 = 1 process x 2 or more accumulation steps."""

    def train(out: str, **changes: Any) -> None:
        config = tiny_config(exit_layers=(2, 4), **SETTINGS[name] | changes)
        # fewer samples than responses: the same question is asked in several processes
        samples = [replace(each, answers=each.answers if each.kind == "vqa" else ()) for each in make_samples()[:6]]
        align(vlm, samples, reward=reward, config=config, out=tmp_path / out)

    train("whole", microbatch_tokens=10_000)
    train("accumulated", microbatch_tokens=40)
    together(num_processes, lambda number: train("shared", microbatch_tokens=10_000))
    assert reward is None or sum(line["num_unscored"] for line in curve(tmp_path / "whole")) > 0
    for out in ("accumulated", "shared"):
        assert_alike(tmp_path / "whole", tmp_path / out)


def test_each_calibration_answer_is_scored_by_one_process(vlm: VLM, tmp_path: Path) -> None:
    def work(number: int) -> None:
        asked: list[int] = []

        def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
            asked.append(len(responses))
            return [float(len(response.text)) for response in responses]

        config = tiny_config(calibration_samples=9, num_steps=2)
        align(vlm, make_samples(), reward=reward, config=config, out=tmp_path / "run")
        assert asked == [5 - number, 4, 4]

    together(2, work)


def test_an_evaluation_of_two_processes_sees_what_one_sees(vlm: VLM, tmp_path: Path) -> None:
    trained, held_out = keep_apart(make_samples(), per_kind=1)
    evaluation = Evaluation(samples=held_out, judge=Fickle(), every=2, patience=None)

    def train(out: str) -> None:
        align(vlm, trained, reward=count_red, config=tiny_config(), evaluation=evaluation, out=tmp_path / out)

    train("one")
    together(2, lambda number: train("two"))
    one, two = ((tmp_path / out / "evaluations.jsonl").read_text().splitlines() for out in ("one", "two"))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert numbers(json.loads(b)) == pytest.approx(numbers(json.loads(a)), abs=1e-5)
    assert_alike(tmp_path / "one", tmp_path / "two")


class StubPolicy:
    """Knows the log-probability of a response of one token by its id, and expects nothing."""

    vlm = SimpleNamespace(device=torch.device("cpu"), base_model=SimpleNamespace(dtype=torch.float32))

    def evaluate(self, rows: Sequence[Any], responses: Sequence[torch.Tensor]) -> PolicyOutput:
        ids = torch.stack([response.float() for response in responses])
        nothing = torch.zeros_like(ids)
        return PolicyOutput(logprobs=-ids, values=nothing, entropy=nothing, mask=torch.ones_like(ids, dtype=torch.bool))

    def as_reference(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_whitening_is_over_all_processes(tmp_path: Path) -> None:
    """Scores 3, 1 in one process and 1, -1 in the other: mean 1, variance 2. Each alone would see deviation 1."""
    batch = Batch(
        rows=[None] * 4,  # type: ignore[list-item]
        responses=[torch.tensor([place]) for place in range(4)],
        minibatches=[[[0, 1], [2, 3]]],
        shares=[[[[0, 1]], [[2, 3]]]],
        microbatch=BatchSize(10, problem=""),
        num_tokens=10,
    )
    scores = torch.tensor([3.0, 1.0, 1.0, -1.0])

    def work(number: int) -> None:
        policy: Any = StubPolicy()
        measured: Measured = measure(policy, batch, this_team())
        assert measured.logprobs.tolist() == [[0.0], [-1.0], [-2.0], [-3.0]]
        mask = measured.mask
        rewards = shaped_rewards(scores, measured.logprobs, measured.ref_logprobs, mask, kl_coef=0.0)
        advantages, returns = gae(rewards, measured.values, mask, gamma=1.0, lam=0.95)
        advantages = masked_whiten(advantages, mask)
        assert advantages[:, 0].tolist() == pytest.approx([2**0.5, 0.0, 0.0, -(2**0.5)], abs=1e-6)
        assert returns[:, 0].tolist() == scores.tolist()

    together(2, work)


def team_of(size: int, number: int) -> Team:
    process: Any = SimpleNamespace(num_processes=size, process_index=number, device=torch.device("cpu"))
    return Team(process)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("group_size", [1, 4])
def test_every_place_is_somebodys_and_groups_stay_whole(size: int, group_size: int) -> None:
    dealt = [team_of(size, number).places(12, group_size=group_size) for number in range(size)]
    assert sorted(place for places in dealt for place in places) == list(range(12))
    for places in dealt:
        assert all(place // group_size * group_size + i in places for place in places for i in range(group_size))
    groups = [len(places) // group_size for places in dealt]
    assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_same_rows_share_an_optimiser_step_whatever_the_number_of_processes(size: int) -> None:
    draw = np.random.default_rng(1)
    sizes = [(20 + int(draw.integers(9)), 1 + int(draw.integers(9))) for _ in range(24)]
    groups = [[2 * i, 2 * i + 1] for i in range(12)]

    def deal(num_shares: int) -> list[list[list[int]]]:
        return split(
            sizes,
            [0] * 24,
            groups,
            minibatch_size=8,
            microbatch_tokens=10_000,
            rng=np.random.default_rng(0),
            num_shares=num_shares,
        )

    whole, shared = deal(1), deal(size)
    assert [len(minibatch) for minibatch in whole] == [1, 1, 1]
    for (rows,), minibatch in zip(whole, shared, strict=True):
        shares = share_out(minibatch, sizes, size)
        parts = [part for share in shares for part in share]
        assert sorted(row for part in parts for row in part) == sorted(rows)
        for group in groups:  # packed together, so never apart
            assert sum(set(group) <= set(part) for part in parts) == (group[0] in rows)
        assert sum(bool(share) for share in shares) >= min(size, 3)  # four groups
        loads = [sum(sum(sizes[row]) for part in share for row in part) for share in shares]
        assert max(loads) <= min(loads) + 130  # no more than two groups


def test_gradients_are_summed_and_what_nobody_trains_keeps_none() -> None:
    def work(number: int) -> None:
        both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
        both.grad = torch.tensor([1.0, 10.0 + number])
        if number == 1:
            one.grad = torch.tensor([3.0, 4.0])
        this_team().sum_gradients([both, one, none])
        assert both.grad is not None
        assert both.grad.tolist() == [2.0, 21.0]
        assert one.grad is not None
        assert one.grad.tolist() == [3.0, 4.0]
        assert none.grad is None  # Adam would move it by its momentum

    together(2, work)


def killed_at(step: int, children: Sequence[int], out: Path) -> None:
    """`kill -9` to all when so many steps are done."""
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert wait(children) == [-signal.SIGKILL] * len(children)


def test_killed_on_two_processes_it_goes_on_with_the_same_bits_and_on_one_with_rounding(
    vlm: VLM, tmp_path: Path
) -> None:
    def train(out: str, reward: Reward) -> Callable[[int], None]:
        config = tiny_config(kl_target=0.01)

        def work(number: int) -> None:
            align(vlm, make_samples(), reward=reward, config=config, out=tmp_path / out)

        return work

    together(2, train("whole", drawing_red))
    killed_at(3, start(2, train("killed", drawing_red)), tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter").exists()
    together(2, train("killed", drawing_red))
    for name, weight in adapter(tmp_path / "whole").items():
        assert torch.equal(weight, adapter(tmp_path / "killed")[name]), name
    one, other = (list(map(numbers, curve(tmp_path / out))) for out in ("whole", "killed"))
    assert one == other

    killed_at(3, start(2, train("alone", slow_red)), tmp_path / "alone")
    train("alone", slow_red)(0)
    train("one", slow_red)(0)
    assert_alike(tmp_path / "one", tmp_path / "alone")


def slow_red(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    """Leaves time to be killed."""
    time.sleep(0.1)
    return count_red(samples, responses)


def drawing_red(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    """Hangs on each process's own random state: the second draws more than the first."""
    draws = 1 + int(os.environ["RANK"])
    return [value + torch.rand(draws)[-1].item() for value in slow_red(samples, responses)]


def test_a_signal_to_one_process_ends_all_after_the_same_step(vlm: VLM, tmp_path: Path) -> None:
    def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        calls.append(1)
        if int(os.environ["RANK"]) == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_red(samples, responses)

    calls: list[int] = []

    def work(number: int) -> None:
        with pytest.raises(KeyboardInterrupt, match="resume from step 2 of 4"):
            align(vlm, make_samples(), reward=reward, config=tiny_config(checkpoint_every=100), out=tmp_path / "run")

    together(2, work)
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    assert len(curve(tmp_path / "run")) == 2


def test_where_one_process_fails_the_other_does_not_hang(vlm: VLM, tmp_path: Path) -> None:
    def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        if int(os.environ["RANK"]) == 1:
            raise RunError("the reward is broken")
        return count_red(samples, responses)

    def work(number: int) -> None:
        said = "another process has failed" if number == 0 else "the reward is broken"
        with pytest.raises(RunError, match=said):
            align(vlm, make_samples(), reward=reward, config=tiny_config(), out=tmp_path / "run")
        os._exit(0)

    together(2, work)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "fsdp2_keep.yaml"])
def test_the_command_under_accelerate_launch(tmp_path: Path, config: str) -> None:
    """By the very files of examples/, on two processes of this machine."""
    model, suite = save_tiny("llava", tmp_path / "model"), write_suite(tmp_path / "suite", num_samples=16)
    file = Path(__file__).parents[2] / "examples" / "align" / config
    flags = ["--steps", "3", "--batch-size", "8", "--max-new-tokens", "5", "--dtype", "float32", "--json"]
    flags += ["--reward", "refusal-prefix"]
    arguments = ["-m", "exitsafe", "align", str(model), "--suite", str(suite), *flags, "--out"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=offline, check=False)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)  # one, not two
        return document

    one = run(*arguments, str(tmp_path / "one"))
    two = run(*launch, *arguments, str(tmp_path / "two"))
    assert one["settings"] == two["settings"]
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-3, abs=1e-5)
