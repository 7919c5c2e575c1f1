"""LoRA on 4-bit and 8-bit language models, as far as bitsandbytes' CPU kernels go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.lppo import align
from exitsafe.lppo.policy import attached_policy
from exitsafe.records import Sample
from tests import tiny_models
from tests.lppo.conftest import count_red, tiny_config
from tests.lppo.test_policy import RESPONSES, perturb, rows_at

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint wide enough for 4-bit blocks of 64 weights and CPU kernels of 32 rows."""
    path = tmp_path_factory.mktemp("models") / "wide"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny_models.vision_settings()),
        text_config=tiny_models.text_config(hidden_size=128, intermediate_size=256),
        image_token_index=tiny_models.VOCAB["<image>"],
        vision_feature_layer=-2,
    )
    model = tiny_models.spread(LlavaForConditionalGeneration(config))
    model.to(torch.bfloat16).save_pretrained(path)
    tiny_models.tiny_processor("llava").save_pretrained(path)
    return path


def gradients(vlm: VLM, samples: list[Sample]) -> dict[str, Tensor]:
    with attached_policy(vlm, tiny_config()) as policy:
        perturb(policy)
        rows = rows_at(vlm, samples[1:4], [1, 3, 6])
        with torch.no_grad():  # as in every step: what is sampled and measured must not cost the gradient
            policy.evaluate(rows, RESPONSES[:3])
        policy.evaluate(rows, RESPONSES[:3]).logprobs.sum().backward()
        return {name: weight.grad.clone() for name, weight in policy.weights().items() if weight.grad is not None}


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Plain linear layers with the weights that the 4-bit ones stand for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
            plain.weight.copy_(weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)


def test_gradients_pass_4_bit_layers(folder: Path, samples: list[Sample]) -> None:
    found = gradients(load_vlm(folder, quantization="nf4", device="cpu"), samples)
    plain = load_vlm(folder, quantization="nf4", device="cpu")
    dequantize(plain.model)
    plain.model.is_quantized = False
    expected = gradients(plain, samples)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.99, name
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_align_trains_on_a_quantised_model_and_gives_it_back(
    folder: Path, samples: list[Sample], quantization: str, tmp_path: Path
) -> None:
    vlm = load_vlm(folder, quantization=quantization, device="cpu")
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    modules = {name: (type(module), module.training) for name, module in vlm.model.named_modules()}
    config = tiny_config(num_steps=2, gradient_checkpointing=quantization == "nf4")
    adapter = align(vlm, samples, reward=count_red, config=config, out=tmp_path / "out")
    after = vlm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert {name: (type(module), module.training) for name, module in vlm.model.named_modules()} == modules
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["grad_norm"] > 0
    aligned = load_vlm(folder, adapter=adapter, quantization=quantization, device="cpu")
    assert aligned.generate(samples[:2], 3, max_new_tokens=3)


def test_whole_models_are_not_trained_quantised(folder: Path) -> None:
    vlm = load_vlm(folder, quantization="nf4", device="cpu")
    with (
        pytest.raises(InputError, match="train='full' cannot train quantised weights"),
        attached_policy(vlm, tiny_config(train="full")),
    ):
        pass


def test_weights_repacked_for_answering_on_a_cpu_are_refused(folder: Path, samples: list[Sample]) -> None:
    vlm = load_vlm(folder, quantization="nf4", device="cpu")
    vlm.generate(samples[:1], 3, max_new_tokens=2)
    layer = vlm.model.model.language_model.layers[0].mlp.up_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no bfloat16 kernels to repack for")
    with pytest.raises(InputError, match="load it again before training"), attached_policy(vlm, tiny_config()):
        pass
