"""DeepSpeed's ZeRO-3: the curves and adapter of one process, also after a kill; what else is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exitsafe.errors import InputError
from exitsafe.lppo import align, zero
from exitsafe.lppo.sharding import check_launch
from exitsafe.vlm import VLM
from tests.lppo.conftest import make_samples, make_vlm, tiny_config
from tests.lppo.forks import start, together
from tests.lppo.test_parallel import adapter, assert_alike, curve, killed_at, numbers, picky, slow_red

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed")


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sets what `accelerate launch` sets; tiny weights are cut up too."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(zero, "WHOLE_BELOW", 0)

    def launched() -> None:
        import deepspeed  # noqa: F401

        # on CPUs DeepSpeed compiles a faster way to sum in main memory, which takes minutes; gloo will do
        monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)
        for name, value in ZERO3.items():
            monkeypatch.setenv(name, value)

    return launched


@needs_deepspeed
def test_zero3_gives_the_adapter_of_one_process(vlm: VLM, tmp_path: Path, zero3: Callable[[], None]) -> None:
    def train(out: str) -> None:
        align(vlm, make_samples(), reward=picky, config=tiny_config(num_steps=4), out=tmp_path / out)

    def work(number: int) -> None:
        train("cut-up")
        weights: dict[str, Any] = dict(vlm.model.named_parameters())
        cut_up = {name for name, weight in weights.items() if weight.numel() == 0}
        assert cut_up == {name for name in weights if "language_model.layers" in name}
        assert all(weights[name].ds_tensor.numel() * 2 == weights[name].ds_numel for name in cut_up)

    train("one")
    zero3()
    together(2, work)
    assert_alike(tmp_path / "one", tmp_path / "cut-up")


@needs_deepspeed
def test_bfloat16_weights_stay_so_and_what_is_trained_stays_float32(
    vlm: VLM, tmp_path: Path, zero3: Callable[[], None]
) -> None:
    vlm.model.to(torch.bfloat16)

    def train(out: str) -> None:
        # one step of the value head alone, one of the policy: later ones enlarge what bfloat16 rounds
        align(vlm, make_samples(), reward=picky, config=tiny_config(num_steps=2), out=tmp_path / out)

    def work(number: int) -> None:
        train("cut-up")
        frozen = [weight for weight in vlm.model.parameters() if weight.numel() == 0]
        assert {weight.ds_tensor.dtype for weight in frozen} == {torch.bfloat16}

    train("one")
    zero3()
    together(2, work)
    one, cut_up = adapter(tmp_path / "one"), adapter(tmp_path / "cut-up")
    assert {weight.dtype for weight in cut_up.values()} == {torch.float32}
    trained = torch.cat([weight.flatten() for name, weight in one.items() if "lora_B" in name])
    found = torch.cat([cut_up[name].flatten() for name in one if "lora_B" in name])
    assert trained.abs().max() > 0
    assert torch.nn.functional.cosine_similarity(found, trained, dim=0) > 0.9


@needs_deepspeed
def test_killed_under_zero3_it_goes_on_with_the_same_bits(vlm: VLM, tmp_path: Path, zero3: Callable[[], None]) -> None:
    def train(out: str) -> Callable[[int], None]:
        config = tiny_config(kl_target=0.01, num_steps=4)

        def work(number: int) -> None:
            align(vlm, make_samples(), reward=slow_red, config=config, out=tmp_path / out)

        return work

    zero3()
    together(2, train("whole"))
    killed_at(3, start(2, train("killed")), tmp_path / "killed")
    together(2, train("killed"))
    for name, weight in adapter(tmp_path / "whole").items():
        assert torch.equal(weight, adapter(tmp_path / "killed")[name]), name
    one, other = (list(map(numbers, curve(tmp_path / out))) for out in ("whole", "killed"))
    assert one == other


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "mllama"])
@pytest.mark.parametrize(
    "changes",
    [
        {"feature_cache_gb": 0.0},
        {"gradient_checkpointing": True, "group_size": 2},
        {"algorithm": "grpo", "group_size": 4, "minibatch_size": 8},
    ],
)
def test_zero3_with_other_families(
    family: str, changes: dict[str, Any], tmp_path: Path, zero3: Callable[[], None]
) -> None:
    vlm = make_vlm(family)

    def train(out: str) -> None:
        align(vlm, make_samples(), reward=picky, config=tiny_config(num_steps=3, **changes), out=tmp_path / out)

    train("one")
    zero3()
    together(3, lambda number: train("cut-up"))
    assert_alike(tmp_path / "one", tmp_path / "cut-up")


@needs_deepspeed
@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "ZeRO-2 cuts up what is trained, .* set zero_stage to 3"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}, "set zero3_init_flag to false"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "set both offload devices to none"),
        ({}, {"train": "full"}, "ZeRO-3 are for train='lora'"),
    ],
)
def test_what_is_refused(
    vlm: VLM,
    monkeypatch: pytest.MonkeyPatch,
    zero3: Callable[[], None],
    environment: dict[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    zero3()
    check_launch(vlm, tiny_config())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_launch(vlm, tiny_config(**changes))


def test_without_the_package_it_is_said_in_one_line(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install deepspeed"):
        check_launch(vlm, tiny_config())


def test_modules_taken_out_come_back_in_their_places() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    root = nn.ModuleDict({"a": nn.Linear(1, 1), "inner": inner, "z": nn.Linear(1, 1)})
    before = [name for name, _ in root.named_modules()]
    with zero._taken_out(root, [root["a"], inner[0]]):
        assert [name for name, _ in root.named_modules()] == ["", "inner", "inner.1", "inner.2", "z"]
    assert [name for name, _ in root.named_modules()] == before
