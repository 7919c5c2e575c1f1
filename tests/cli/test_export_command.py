from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from exitsafe.cli.main import run
from tests.cli.conftest import Fail
from tests.exporting.slim_models import save_adapter


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.exporting.probe._TIMES", 1)


def test_export_and_what_it_says(
    tiny_llava: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = tmp_path / "slim"
    export = ["export", str(tiny_llava), "--exit-layer", "2", "--out", str(slim), "--audit", str(audited)]
    assert run([*export, "--to", "gguf"]) == 0
    said = capsys.readouterr().out
    for part in (
        "encoder blocks",
        "prefill with encoder, ms",
        "bit for bit",
        f"exitsafe verify {slim} --against {audited}",
        f"llama.cpp: yes; python convert_hf_to_gguf.py {slim} --outfile slim.gguf && llama-server",
        f"vLLM: yes; vllm serve {slim}\n",
        f"OpenVINO: not tried; optimum-cli export openvino --model {slim}",
        "MLX: not tried; python -m mlx_vlm convert",
    ):
        assert part in said.replace("\n", " ") + said
    assert AutoModelForImageTextToText.from_pretrained(slim).config.vision_config.num_hidden_layers == 2
    assert "model-index" in (slim / "README.md").read_text()
    assert list(tmp_path.iterdir()) == [slim]


def test_json(tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tiny_llava, tmp_path / "adapter")
    flags = ["--adapter", str(adapter), "--keep-adapter", "--dtype", "bfloat16", "--exit-layer", "3"]
    assert run(["export", str(tiny_llava), *flags, "--out", str(tmp_path / "slim"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slim"] == str(tmp_path / "slim")
    assert (found["exit_layer"], found["adapter"], found["dtype"]) == (3, "kept", "bfloat16")
    assert found["sizes"]["before"]["parameters"] > found["sizes"]["after"]["parameters"]
    assert found["latency"]["after"]["encoder_ms"] > 0
    assert found["check"] == {"largest_difference": 0.0, "relative_difference": 0.0, "allowed": 0.0}
    assert "adapter/adapter_model.safetensors" in found["files"]
    assert [place["engine"] for place in found["destinations"]] == ["llama.cpp", "vLLM", "OpenVINO", "MLX"]


def test_bad_input(tiny_llava: Path, audited: Path, tmp_path: Path, fail: Fail) -> None:
    out = tmp_path / "slim"
    export = ["export", tiny_llava, "--out", out]
    assert "Missing option '--exit-layer'" in fail(*export)
    assert "choose 1 to 6" in fail(*export, "--exit-layer", "7")
    assert "integer" in fail(*export, "--exit-layer", "two")
    assert "no adapter to keep: leave --keep-adapter out" in fail(*export, "--exit-layer", "2", "--keep-adapter")
    assert "no global blocks" in fail(*export, "--exit-layer", "2", "--config", "skip_global=true")
    assert "is not a folder" in fail(*export, "--exit-layer", "2", "--audit", tmp_path / "none")
    assert "has no exit layer 3" in fail(*export, "--exit-layer", "3", "--audit", audited)
    assert "is a run of another model" in fail(
        "export", "organism", "--out", out, "--exit-layer", "2", "--audit", audited
    )
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("")
    assert "already exists and is not empty" in fail(*export, "--exit-layer", "2")
