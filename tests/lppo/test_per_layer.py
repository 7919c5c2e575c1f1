"""One adapter per exit: each run is that of its exit alone, and all go on together."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exitsafe.errors import InputError, RunError
from exitsafe.lppo import LPPOConfig, align
from exitsafe.lppo.parallel import Team
from exitsafe.records import Response, Sample
from exitsafe.vlm import VLM, load_vlm
from tests.lppo.conftest import count_red, make_samples, make_vlm, tiny_config
from tests.tiny_models import save_tiny

EXITS = (2, 4)
QUICK: dict[str, Any] = {"num_steps": 3, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at exits 2 and 4."""
    torch.set_num_threads(1)  # as all tests here: the number of threads decides the last bit
    out = tmp_path_factory.mktemp("whole") / "run"
    align(make_vlm("llava"), make_samples(), reward=count_red, config=per_layer(), out=out)
    return out


def per_layer(**changes: Any) -> LPPOConfig:
    return tiny_config(**QUICK | {"adapters": "per-layer", "exit_layers": EXITS} | changes)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, but for time and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds" and not k.endswith("_bytes")} for line in lines]


def weights_of(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("exit_layer", EXITS)
def test_an_exits_run_is_that_of_the_exit_alone_bit_for_bit(
    whole: Path, vlm: VLM, samples: list[Sample], tmp_path: Path, exit_layer: int
) -> None:
    alone = tiny_config(**QUICK, exit_layers=(exit_layer,), include_default=False)
    adapter = align(vlm, samples, reward=count_red, config=alone, out=tmp_path / "alone")
    mine = whole / f"layer-{exit_layer:02}"
    assert_equal(weights_of(adapter), weights_of(mine / "adapter"))
    assert_equal(weights_of(adapter), weights_of(whole / "adapter" / mine.name))
    assert steps_of(tmp_path / "alone") == steps_of(mine)
    records = [json.loads((folder / "run.json").read_text())["settings"] for folder in (tmp_path / "alone", mine)]
    assert records[0] == records[1]


def test_the_folder_says_what_was_done(whole: Path) -> None:
    settings = json.loads((whole / "run.json").read_text())["settings"]
    assert settings["trained_exits"] == list(EXITS)  # not the default exit: nothing can have cost it anything
    assert settings["config"]["adapters"] == "per-layer"
    assert sorted(path.name for path in (whole / "adapter").iterdir()) == ["layer-02", "layer-04"]
    first, second = weights_of(whole / "adapter" / "layer-02"), weights_of(whole / "adapter" / "layer-04")
    assert not all(torch.equal(first[name], second[name]) for name in first)
    wanted = [{"exit_layer": layer} | step for layer in EXITS for step in steps_of(whole / f"layer-{layer:02}")]
    assert steps_of(whole) == wanted
    results = json.loads((whole / "result.json").read_text())["exits"]
    assert results.keys() == {"2", "4"}
    said = {"steps": 3, "adapter_step": 3, "why": "the last step", "learnt": True}
    for result in results.values():
        assert result | said == result


def test_the_model_is_given_back_and_takes_the_folder(whole: Path, tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "llava")
    with pytest.warns(UserWarning, match="no adapter for exits 1,3,5,6, which answer with the base model"):
        vlm = load_vlm(folder, adapter=whole / "adapter")
    assert [vlm.adapter_at(exit_layer) for exit_layer in (1, 2, 4)] == [None, "layer-02", "layer-04"]
    with pytest.raises(InputError, match="carries an adapter"):
        align(vlm, make_samples(), reward=count_red, config=per_layer(), out=tmp_path / "run")


def test_a_finished_run_is_done_and_changed_settings_are_refused(whole: Path, vlm: VLM, samples: list[Sample]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert align(vlm, samples, reward=count_red, config=per_layer(), out=whole) == whole / "adapter"
    with pytest.raises(RunError, match=r"trained_exits was \[2,4\], is now \[2,3\]"):
        align(vlm, samples, reward=count_red, config=per_layer(exit_layers=(2, 3)), out=whole)
    with pytest.raises(RunError, match=r"config\.adapters was"):
        align(vlm, samples, reward=count_red, config=tiny_config(**QUICK, exit_layers=EXITS), out=whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_with_the_exit_under_way(
    whole: Path, vlm: VLM, samples: list[Sample], tmp_path: Path, number: int
) -> None:
    calls = 0

    def interrupting(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second step of the second exit
            os.kill(os.getpid(), number)
        return count_red(samples, responses)

    out = tmp_path / "run"
    with pytest.raises(
        KeyboardInterrupt, match="interrupted at exit 4; rerun the same command to resume from step 2 of 3"
    ):
        align(vlm, samples, reward=renamed(interrupting), config=per_layer(), out=out)
    assert not (out / "adapter").exists()
    done = (out / "layer-02" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    said: list[tuple[int, int, str]] = []
    align(
        vlm,
        samples,
        reward=renamed(interrupting),
        config=per_layer(),
        out=out,
        progress=lambda *words: said.append(words),
    )
    assert (out / "layer-02" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == done
    assert said[0] == (5, 6, "exit 4 (2 of 2)")
    assert [words[:2] for words in said[1:]] == [(6, 6)]
    assert said[1][2].startswith("exit 4 (2 of 2): reward ")
    for name in ("layer-02", "layer-04"):
        assert_equal(weights_of(out / "adapter" / name), weights_of(whole / "adapter" / name))
    assert steps_of(out) == steps_of(whole)


def renamed(reward: Any) -> Any:
    """The same name in the settings as `count_red`."""
    reward.__module__, reward.__qualname__ = count_red.__module__, count_red.__qualname__
    return reward


def test_what_has_no_meaning_one_exit_at_a_time_is_refused(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="default_share means nothing with adapters='per-layer'"):
        per_layer(default_share=0.2)
    with pytest.raises(InputError, match="layer_sampler means nothing with adapters='per-layer'"):
        per_layer(layer_sampler="worst-first")
    with pytest.raises(InputError, match="adapters='each' is unknown; choose shared or per-layer"):
        tiny_config(adapters="each")
    with pytest.raises(InputError, match="choose 1 to 6"):
        align(vlm, samples, config=per_layer(exit_layers=(2, 9)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_cut_up_are_refused(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Team()
    team.is_sharded = True
    monkeypatch.setattr("exitsafe.lppo.trainer.this_team", lambda: team)
    with pytest.raises(InputError, match="cannot be trained on weights that are cut up"):
        align(vlm, samples, reward=count_red, config=per_layer(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shared_runs_say_nothing_of_it_so_older_ones_go_on(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    align(vlm, samples, reward=count_red, config=tiny_config(num_steps=2), out=tmp_path / "run")
    assert "adapters" not in json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["config"]


def test_a_run_that_learns_nothing_says_at_which_exit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^exit 2: nothing was learnt"):
        align(
            make_vlm("llava"), make_samples(), reward=count_red, config=per_layer(max_ratio=0.5), out=tmp_path / "run"
        )


def test_completions_of_all_exits_are_gathered(tmp_path: Path) -> None:
    config = per_layer(save_completions=1, num_steps=2)
    align(make_vlm("llava"), make_samples(), reward=count_red, config=config, out=tmp_path / "run")
    file = tmp_path / "run" / "completions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["exit_layer"], row["step"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert file.stat().st_mode & 0o777 == 0o600
