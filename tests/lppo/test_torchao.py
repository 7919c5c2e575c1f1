"""LoRA on a language model that torchao has quantised to int8, on CPU kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from exitsafe.doctor import load_blueprint
from exitsafe.doctor.blueprint import weights_of
from exitsafe.engine.load import load_vlm
from exitsafe.lppo import align
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, tiny_config
from tests.lppo.test_quantized import gradients
from tests.tiny_models import save_tiny

torchao = pytest.importorskip("torchao", reason="needs exitsafe[quantization]")
INT8 = "torchao-int8"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("models") / "llava")


def test_the_language_model_alone_is_quantised_and_as_large_as_planned(folder: Path) -> None:
    vlm = load_vlm(folder, quantization=INT8, device="cpu")
    linear = {name: module for name, module in vlm.model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        is_int8 = type(module.weight).__name__ == "Int8Tensor"
        assert is_int8 == name.startswith("model.language_model."), name
    used = 0
    for tensor in (*vlm.model.parameters(), *vlm.model.buffers()):
        parts = [getattr(tensor, part) for part in ("qdata", "scale") if hasattr(tensor, part)]
        used += sum(part.nbytes for part in parts) if parts else tensor.nbytes
    assert weights_of(load_blueprint(folder, quantization=INT8)).total == used


def test_gradients_are_those_of_the_weights_it_stands_for(folder: Path, samples: list[Sample]) -> None:
    found = gradients(load_vlm(folder, quantization=INT8, device="cpu"), samples)
    plain = load_vlm(folder, device="cpu")
    quantized = load_vlm(folder, quantization=INT8, device="cpu")
    with torch.no_grad():
        for name, module in quantized.model.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight).__name__ == "Int8Tensor":
                plain.model.get_submodule(name).weight.copy_(module.weight.dequantize())
    expected = gradients(plain, samples)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item()), name


def test_align_trains_on_it_and_gives_it_back(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    vlm = load_vlm(folder, quantization=INT8, device="cpu")
    before = vlm.generate(samples[:2], exit_layers=3, max_new_tokens=4)
    path = align(vlm, samples, reward=count_red, config=tiny_config(num_steps=3), out=tmp_path / "run")
    trained = load_file(path / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)
    after = vlm.generate(samples[:2], exit_layers=3, max_new_tokens=4)
    assert [each.text for each in after] == [each.text for each in before]
    record = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["model"]["quantization"]
    assert record["quant_method"] == "torchao"
    adapted = load_vlm(folder, quantization=INT8, adapter=path, device="cpu")
    assert adapted.generate(samples[:2], exit_layers=3, max_new_tokens=4)
