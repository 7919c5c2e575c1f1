"""A slim checkpoint in, where else it can run out: llama.cpp, vLLM, OpenVINO, MLX, each with a command.

"yes" means that exports of exitsafe were run there, "no" that they are known to fail; the rest is "not tried".
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exitsafe.exporting.mmproj import MMPROJ

Runs = Literal["yes", "no", "not tried"]
_OLDER_TRANSFORMERS = {"smolvlm": "4.57", "internvl": "4.57", "qwen2_5_vl": "5.0"}
"""The newest transformers that optimum-intel takes for a family, where that is older than 5.18."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """An engine, whether the checkpoint runs there, the command, and what to know first."""

    engine: str
    runs: Runs
    command: str = ""
    note: str = ""


def destinations(folder: Path) -> list[Destination]:
    """Where the checkpoint in a folder that `export` wrote can run."""
    config = json.loads((folder / "config.json").read_bytes())
    name = shlex.quote(str(folder))
    return [_llama_cpp(folder, config), _vllm(config, name), _openvino(config, name), _mlx(name)]


def _llama_cpp(folder: Path, config: Mapping[str, Any]) -> Destination:
    family, vision = config["model_type"], config.get("vision_config", {})
    name, model = shlex.quote(str(folder)), shlex.quote(f"{folder.name}.gguf")
    convert = f"python convert_hf_to_gguf.py {name} --outfile {model}"
    if (folder / MMPROJ).is_file():
        serve = f"llama-server -m {model} --mmproj {shlex.quote(str(folder / MMPROJ))}"
        if vision["model_type"] == "clip_vision_model":
            note = (
                "it projects CLIP's class token in place of the first patch, which changes answers: exitsafe verify "
                "URL --reference MODEL measures how many"
            )
        else:
            note = "it resizes and pads pictures in its own way: exitsafe verify URL --reference MODEL shows the effect"
        return Destination(engine="llama.cpp", runs="yes", command=f"{convert} && {serve}", note=note)
    if family == "llava":
        note = "with the encoder files of its own converters it runs one block too few: export with --to gguf"
        return Destination(engine="llama.cpp", runs="no", note=note)
    if vision.get("fullatt_block_indexes") == []:
        note = "its converter needs a block with full attention, and all of them are past this exit"
        return Destination(engine="llama.cpp", runs="no", note=note)
    return Destination(engine="llama.cpp", runs="not tried", command=f"{convert} (again with --mmproj)")


def _vllm(config: Mapping[str, Any], name: str) -> Destination:
    family = config["model_type"]
    if family == "mllama":
        return Destination(engine="vLLM", runs="no", note="support for Llama 3.2 Vision ended with 0.10.2")
    runs: Runs = "yes" if family in ("llava", "qwen2_5_vl") else "not tried"
    return Destination(engine="vLLM", runs=runs, command=f"vllm serve {name}")


def _openvino(config: Mapping[str, Any], name: str) -> Destination:
    older = _OLDER_TRANSFORMERS.get(config["model_type"])
    note = f"optimum-intel needs transformers {older} or older for this family" if older else ""
    command = f"optimum-cli export openvino --model {name} {name}-openvino"
    return Destination(engine="OpenVINO", runs="not tried", command=command, note=note)


def _mlx(name: str) -> Destination:
    return Destination(
        engine="MLX", runs="not tried", command=f"python -m mlx_vlm convert --hf-path {name} --mlx-path {name}-mlx"
    )
