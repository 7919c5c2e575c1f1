"""FSDP2: the adapter of one process; other ways to start are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.encoder import Encoder
from exitsafe.lppo import align
from exitsafe.lppo.sharding import check_launch
from tests.architectures import tiny_model
from tests.forks import together
from tests.lppo.conftest import count_red, make_samples, make_vlm, tiny_config
from tests.lppo.test_parallel import assert_alike, picky

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_fsdp2_gives_the_adapter_of_one_process(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reshard: str
) -> None:
    def train(out: str) -> None:
        align(vlm, make_samples(), reward=picky, config=tiny_config(num_steps=3), out=tmp_path / out)

    def work(number: int) -> None:
        told: list[bool] = []

        def shard_block(block: torch.nn.Module, **settings: Any) -> Any:
            told.append(settings["reshard_after_forward"])
            return fully_shard(block, **settings)

        monkeypatch.setattr("exitsafe.lppo.sharding.fully_shard", shard_block)
        train("cut-up")
        assert set(told) == {reshard == "true"}
        weights = dict(vlm.model.named_parameters())
        cut_up = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
        assert len(cut_up) == sum("language_model.layers" in name for name in weights)
        assert weights[cut_up[0]].to_local().numel() * 2 == weights[cut_up[0]].numel()

    train("one")
    for name, value in {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": reshard}.items():
        monkeypatch.setenv(name, value)
    together(2, work)
    assert_alike(tmp_path / "one", tmp_path / "cut-up")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "mllama"])
@pytest.mark.parametrize("changes", [{"feature_cache_gb": 0.0}, {"gradient_checkpointing": True, "group_size": 2}])
def test_fsdp2_with_other_families(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = make_vlm(family)

    def train(out: str) -> None:
        align(vlm, make_samples(), reward=count_red, config=tiny_config(num_steps=4, **changes), out=tmp_path / out)

    train("one")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    together(3, lambda number: train("cut-up"))
    assert_alike(tmp_path / "one", tmp_path / "cut-up")


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "set fsdp_version to 2"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "set fsdp_cpu_ram_efficient_loading to false"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "set fsdp_offload_params to false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "training under DeepSpeed is not supported: use FSDP2"),
        (FSDP, {"train": "full"}, "FSDP is for train='lora'"),
    ],
)
def test_ways_to_start_that_are_not_supported(
    vlm: VLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        align(vlm, make_samples(), config=tiny_config(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fsdp2_is_supported_as_the_example_starts_it(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    check_launch(vlm, tiny_config())


def test_a_decoder_that_contains_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(modality="image", path="vision_model.model.layers", num_layers=6, default_exit=6)
    vlm = VLM(tiny_model("llama4"), None, encoder=encoder, name="tiny")
    assert vlm.linear_layers and not any("lm_head" in name for name in vlm.linear_layers)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="FSDP finds no blocks in the decoder of llama4"):
        check_launch(vlm, tiny_config())
