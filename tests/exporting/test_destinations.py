from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from exitsafe.exporting.destinations import Destination, destinations
from exitsafe.exporting.mmproj import MMPROJ


def _places(folder: Path, *, mmproj: bool = False, **config: Any) -> dict[str, Destination]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if mmproj:
        (folder / MMPROJ).touch()
    return {place.engine: place for place in destinations(folder)}


@pytest.mark.parametrize(
    ("tower", "note"), [("clip_vision_model", "class token"), ("siglip_vision_model", "resizes and pads")]
)
def test_a_written_encoder_runs_in_llama_cpp_with_what_to_know(tower: str, note: str, tmp_path: Path) -> None:
    folder = tmp_path / "my slim"
    place = _places(folder, mmproj=True, model_type="llava", vision_config={"model_type": tower})["llama.cpp"]
    assert place.runs == "yes" and note in place.note and "exitsafe verify URL --reference" in place.note
    convert, serve = (shlex.split(command) for command in place.command.split(" && "))
    assert convert == ["python", "convert_hf_to_gguf.py", str(folder), "--outfile", "my slim.gguf"]
    assert serve == ["llama-server", "-m", "my slim.gguf", "--mmproj", str(folder / MMPROJ)]


@pytest.mark.parametrize(
    ("config", "engine", "runs", "note"),
    [
        ({"model_type": "llava"}, "llama.cpp", "no", "export with --to gguf"),
        ({"model_type": "llava"}, "vLLM", "yes", ""),
        ({"model_type": "mllama"}, "vLLM", "no", "ended with 0.10.2"),
        ({"model_type": "qwen2_5_vl"}, "vLLM", "yes", ""),
        ({"model_type": "gemma3"}, "vLLM", "not tried", ""),
        ({"model_type": "qwen2_5_vl", "vision_config": {"fullatt_block_indexes": []}}, "llama.cpp", "no", "full att"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"fullatt_block_indexes": [7]}}, "llama.cpp", "not tried", ""),
        ({"model_type": "smolvlm"}, "OpenVINO", "not tried", "transformers 4.57 or older"),
        ({"model_type": "llava"}, "OpenVINO", "not tried", ""),
        ({"model_type": "llava"}, "MLX", "not tried", ""),
    ],
)
def test_what_is_known_of_an_engine(config: dict[str, Any], engine: str, runs: str, note: str, tmp_path: Path) -> None:
    place = _places(tmp_path / "slim", **config)[engine]
    assert place.runs == runs and (note in place.note if note else not place.note)
    assert bool(place.command) == (runs != "no")
