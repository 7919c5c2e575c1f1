"""Exports load strictly in the lowest version of transformers that exitsafe supports, and compute the same there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import exitsafe
from exitsafe.engine.vlm import VLM
from exitsafe.exporting.probe import logits_of, probe_inputs
from tests.engines.served_models import served_model
from tests.engines.server import python_of
from tests.tiny_models import tiny_model, tiny_processor

pytestmark = pytest.mark.engines
_LOAD = """
import sys, torch, transformers
folder, inputs, logits = sys.argv[1:]
model, found = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(found.values()), found
with torch.no_grad():
    now = model.eval()(**torch.load(inputs), use_cache=False).logits
difference = float((now - torch.load(logits)).abs().max())
print(transformers.__version__, difference)
"""


def _tiny(family: str) -> VLM:
    return VLM(tiny_model(family), tiny_processor(family), name=family)


@pytest.mark.parametrize(
    "make",
    [
        *(partial(served_model, kind) for kind in ("organism", "llava-siglip", "qwen2_5_vl", "smolvlm")),
        *(partial(_tiny, family) for family in ("llava_next", "mllama")),
    ],
    ids=("llava", "llava-siglip", "qwen2_5_vl", "smolvlm", "llava_next", "mllama"),
)
def test_the_lowest_transformers_computes_the_same(make: Callable[[], VLM], tmp_path: Path) -> None:
    environment = python_of("transformers").parents[1]
    vlm = make()
    slim = exitsafe.export(vlm, exit_layer=3, out=tmp_path / "slim")
    inputs = probe_inputs(vlm)
    with vlm.exit_at(3):
        logits = logits_of(vlm.model, inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(logits, tmp_path / "logits.pt")
    command: list[str | Path] = [sys.executable, "-c", _LOAD, slim, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(environment), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, difference = done.stdout.split()[-2:]
    assert version == "5.18.0"
    assert float(difference) == 0.0
