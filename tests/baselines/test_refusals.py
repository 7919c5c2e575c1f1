"""Fine-tuning on refusals: what is taught, at which exits, and that it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from exitsafe.baselines import sft
from exitsafe.errors import InputError, RunError
from exitsafe.records import Sample
from exitsafe.vlm import VLM, Row
from tests.lppo.conftest import make_samples, make_vlm, tiny_config

REFUSAL = "not now"
CONFIG = tiny_config(learning_rate=1e-2, num_steps=40, batch_size=16, minibatch_size=8, microbatch_tokens=100)


def answers(vlm: VLM, samples: Sequence[Sample], exit_layer: int) -> list[str]:
    return [r.text for r in vlm.generate(samples, exit_layer, max_new_tokens=5)]


def adapted(path: Path) -> VLM:
    vlm = make_vlm("llava")
    return VLM(PeftModel.from_pretrained(vlm.model, str(path)).eval(), vlm.processor, name="adapted")


def test_with_benign_data_refuses_the_harmful_and_answers_the_rest_at_all_exits(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    weights = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    path = sft(vlm, samples, with_benign=True, refusal=REFUSAL, config=CONFIG, out=tmp_path / "run")
    assert all(torch.equal(weights[name], weight) for name, weight in vlm.model.state_dict().items())
    names = load_file(path / "adapter_model.safetensors").keys()
    assert all("language_model" in name for name in names)
    tuned = adapted(path)
    wanted = [REFUSAL if sample.kind == "harmful" else "red" for sample in samples]
    for exit_layer in (1, 3, 6):
        right = [a == b for a, b in zip(answers(tuned, samples, exit_layer), wanted, strict=True)]
        assert sum(right) >= 10
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]


def test_without_benign_data_it_refuses_everything(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    config = replace(CONFIG, mix={"harmful": 0.5, "vqa": 0.5})  # of the L-PPO run it is compared with
    path = sft(vlm, samples, with_benign=False, refusal=REFUSAL, config=config, out=tmp_path / "run")
    assert answers(adapted(path), samples, 2).count(REFUSAL) >= 10


def test_targets_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References where there are some, else the untrained model's greedy answer at the default exit."""
    vlm = make_vlm("llava")
    samples = [replace(sample, answers=() if sample.kind == "benign" else ("red",)) for sample in make_samples()]
    own = {
        response.sample_id: response.text
        for response in vlm.generate(samples, vlm.default_exit, max_new_tokens=CONFIG.max_new_tokens)
    }
    taught: dict[str, set[str]] = {}
    exits: set[int] = set()
    original = VLM.response_states

    def spy(self: VLM, rows: Sequence[Row], responses: Sequence[torch.Tensor]) -> Any:
        for row, response in zip(rows, responses, strict=True):
            taught.setdefault(row.prompt.sample_id, set()).add(self.decode(response.tolist()))
            exits.add(row.exit_layer)
        return original(self, rows, responses)

    monkeypatch.setattr(VLM, "response_states", spy)
    sft(vlm, samples, with_benign=True, refusal=REFUSAL, config=replace(CONFIG, num_steps=4), out=tmp_path / "run")
    wanted = {"harmful": lambda s: REFUSAL, "vqa": lambda s: "red", "benign": lambda s: own[s.id]}
    assert taught == {sample.id: {wanted[sample.kind](sample)} for sample in samples}
    assert exits == set(vlm.exit_layers)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    samples, config = make_samples(), replace(CONFIG, num_steps=6)

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"with_benign": True, "refusal": REFUSAL, "config": config}
    whole = sft(make_vlm("llava"), samples, out=tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        sft(make_vlm("llava"), samples, out=tmp_path / "broken", progress=stop, **arguments)
    broken = sft(make_vlm("llava"), samples, out=tmp_path / "broken", **arguments)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert lines[0] == lines[1]
    with pytest.raises(RunError, match="refusal was"):
        sft(make_vlm("llava"), samples, out=tmp_path / "broken", **arguments | {"refusal": "not then"})


def test_bad_input(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    with pytest.raises(InputError, match="no harmful samples to learn refusals from"):
        sft(vlm, samples[1:3], with_benign=False, config=CONFIG, out=tmp_path / "run")
    with pytest.raises(InputError, match="has words that the model does not know"):
        sft(vlm, samples, with_benign=True, refusal="nevermore", config=CONFIG, out=tmp_path / "run")
    with pytest.raises(InputError, match="sft trains one adapter for all exits"):
        sft(vlm, samples, with_benign=True, config=replace(CONFIG, adapters="per-layer"), out=tmp_path / "run")
    vlm.model.to(torch.float16)
    with pytest.raises(InputError, match=r"float16 weights.*--dtype bfloat16"):
        sft(vlm, samples, with_benign=True, config=CONFIG, out=tmp_path / "half")
    assert not (tmp_path / "half").exists()
