"""PPO at the default exit: the same loop, one exit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from exitsafe.baselines import default_layer_ppo
from exitsafe.lppo import align
from tests.lppo.conftest import count_red, make_samples, make_vlm, tiny_config


def test_every_rollout_is_at_the_default_exit_and_the_loop_is_the_same(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    out = tmp_path / "default"
    config = tiny_config(exit_layers=(1, 2))
    path = default_layer_ppo(vlm, samples, reward=count_red, config=config, out=out)
    assert path == out / "adapter"
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert list(json.loads(line)["reward_by_exit"]) == [str(vlm.default_exit)]
    same = align(vlm, samples, reward=count_red, config=tiny_config(exit_layers=(5,)), out=tmp_path / "lppo")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (path, same))
    assert all(torch.equal(one[name], other[name]) for name in one)
