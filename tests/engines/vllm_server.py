"""A vLLM server of a model folder in a child process, with image embeddings switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exitsafe.exporting.checkpoint import save
from tests.engines.server import free_port, python_of, running

NAME = "served"
"""The model's name in requests."""


@contextmanager
def vllm_server(
    folder: Path, *arguments: str, log: Path, mm_embeds: bool = True, max_model_len: int = 128
) -> Iterator[str]:
    """The URL (without /v1) of `vllm serve FOLDER` in float32 while it runs.

    Args:
        folder: A folder of `save_pretrained` with its processor.
        arguments: More of `vllm serve`'s arguments, for example "--enable-lora", "--lora-modules", "repaired=adapter".
        log: Where its output goes.
        mm_embeds: Whether it accepts image embeddings.
        max_model_len: Its context, in tokens.
    """
    port, python = free_port(), python_of("vllm")
    command: list[str | Path] = [python.parent / "vllm", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--max-model-len", str(max_model_len)]
    command += ["--enforce-eager", *(["--enable-mm-embeds"] if mm_embeds else []), *arguments]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    # its own torchvision and sitecustomize, not those of the tests
    env |= {"PYTHONPATH": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with running(command, port=port, log=log, env=env) as url:
        yield url


def servable(model: Any, processor: Any, folder: Path) -> Path:
    """Save a whole model in float32 so that vLLM loads it: with the tensor names of the Hub's checkpoints.

    `save_pretrained` of a model that was not made by `from_pretrained`, the organism's folder included, has others.
    """
    save(model, folder)
    processor.save_pretrained(folder)
    return folder
