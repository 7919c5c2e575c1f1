"""From the shell, on folders as users have them: doctor, audit, align, audit again, export and verify, and that answers
are those of transformers' `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import exitsafe
from exitsafe.cli.main import run
from exitsafe.engine.prompts import Prompt
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from tests.cli.conftest import write_suite
from tests.model_folders import kinds, save_tiny_folder
from tests.tiny_models import noise_image

_BY_DEFAULT = ("qwen2_5_vl",)
_KINDS = [pytest.param(kind, marks=[] if kind in _BY_DEFAULT else pytest.mark.slow) for kind in kinds()]
_NUM_TOKENS = 6


@pytest.fixture(scope="module", params=_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.exporting.probe._TIMES", 1)


def test_the_whole_flow(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _whole_flow(folder, write_suite(tmp_path / "suite", num_samples=4), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "medium"),
    [
        ("glmasr", "audios"),
        ("qwen2_5_omni_thinker", "audios"),
        ("qwen2_5_vl", "videos"),
        ("qwen3_vl", "videos"),
        ("llava_onevision", "videos"),
    ],
)
def test_the_whole_flow_with_sound_and_video(
    kind: str, medium: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_folder(kind, tmp_path / "model")
    rows = []
    for number in range(4):
        if medium == "audios":
            name = f"{number}.wav"
            sound = np.random.default_rng(number).uniform(-0.5, 0.5, 16_000 * (1 + number % 2))
            soundfile.write(tmp_path / name, sound, 16_000)
            media = [name]
        else:
            media = [f"{number}-{frame}.png" for frame in range(4)]
            for frame, name in enumerate(media):
                noise_image(10 * number + frame, (64, 48)).save(tmp_path / name)
        prompt = "what is the shape" + " now" * number
        row = {"id": f"s{number}", "kind": ("harmful", "benign")[number % 2], "prompt": prompt}
        rows.append(json.dumps(row | {medium: media if medium == "audios" else [media]}))
    suite = tmp_path / "suite.jsonl"
    suite.write_text("\n".join(rows) + "\n")
    _whole_flow(folder, suite, tmp_path, capsys, "--encoder", "audio" if medium == "audios" else "image")


def _whole_flow(
    folder: Path, suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *encoder: str
) -> None:
    suite, model = str(suite_file), str(folder)
    before, trained, after, slim = (str(tmp_path / name) for name in ("before", "lppo", "after", "slim"))
    answers = ["--max-new-tokens", "3"]
    audit = ["audit", model, "--suite", suite, "--layers", "all", "--judge", "refusal-prefix", *answers]
    align = ["align", model, "--suite", suite, "--layers", "2,4,6", "--reward", "refusal-prefix", "--steps", "2"]
    adapter = ["--adapter", f"{trained}/adapter"]
    audit, align = [*audit, *encoder], [*align, *encoder]
    assert run(["doctor", model, *encoder]) == 0
    assert run([*audit, "--out", before]) == 0
    assert run([*align, "--config", "batch_size=4", *answers, "--out", trained]) == 0
    assert run(["audit", model, *adapter, *encoder, "--like", before, "--out", after]) == 0
    assert run(["export", model, *adapter, *encoder, "--exit-layer", "4", "--audit", after, "--out", slim]) == 0
    capsys.readouterr()
    assert run(["verify", slim, "--against", after]) == 0
    assert exitsafe.load_run(before).exit_layers == (1, 2, 3, 4, 5, 6)


def test_mixed_batches_answer_as_generate_does(folder: Path) -> None:
    vlm = exitsafe.load_vlm(folder)
    samples = [
        Sample(
            id=str(number),
            prompt="what colour is the left shape" + " now" * number,
            images=(noise_image(number, (28 + 20 * number, 40)),),
            kind="benign",
        )
        for number in range(5)
    ]
    exits = [1, 3, vlm.default_exit, 2, 3]
    found = vlm.generate(samples, exits, max_new_tokens=_NUM_TOKENS, batch_size=3)
    for sample, exit_layer, response in zip(samples, exits, found, strict=True):
        assert response.text == _stock(vlm, vlm.encode_prompt(sample), exit_layer)


@torch.no_grad()
def _stock(vlm: VLM, prompt: Prompt, exit_layer: int) -> str:
    texts = {name: tensor[None] for name, tensor in prompt.text_inputs.items()}
    tokens: Any = prompt.input_ids[None]
    with vlm.exit_at(exit_layer):
        answer = vlm.base_model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=_NUM_TOKENS,
            do_sample=False,
            **texts,
            **prompt.media,
        )
    return vlm.decode(answer[0, tokens.shape[1] :].tolist())
