"""Adapted tiny models, and what stock transformers makes of an exported folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from tests.tiny_models import noise_image, save_tiny, tiny_processor

LANGUAGE_MODEL = r".*(?:language_model|text_model)\..*\.(?:q_proj|v_proj|down_proj)$"


def save_adapter(folder: Path, out: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A LoRA adapter with random weights for the model in `folder`."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {"r": 4, "target_modules": LANGUAGE_MODEL, "init_lora_weights": False} | settings
    adapted = get_peft_model(load_vlm(folder).model, LoraConfig(**given))
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    return out


def adapted_vlm(family: str, folder: Path, **settings: Any) -> VLM:
    """A saved tiny model with a saved adapter, loaded."""
    model = save_tiny(family, folder / "model")
    return load_vlm(model, adapter=save_adapter(model, folder / "adapter", **settings))


def real_inputs(family: str) -> dict[str, Tensor]:
    """What the real processor makes of a picture and a question."""
    processor = tiny_processor(family)
    image = "<|image|>" if family == "mllama" else "<image>"
    text = f"{image} what colour is the left shape"
    return dict(processor(text=[text], images=[noise_image(3, (56, 41))], return_tensors="pt"))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@lru_cache(maxsize=2)
def load_stock(folder: Path) -> Any:
    """By stock transformers (and stock PEFT, where an adapter was kept); not a weight missing or too many."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()), found
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    return model.eval()


def difference(vlm: VLM, folder: Path, *, exit_layer: int, family: str, skip_global: bool = False) -> float:
    """How far the exported model's logits are from the whole model's at the exit, at most."""
    inputs = real_inputs(family)
    with vlm.exit_at(exit_layer, skip_global=skip_global):
        wanted = logits(vlm.model, inputs)
    return float((logits(load_stock(folder), inputs) - wanted).abs().max())


SAMPLES = [
    Sample(id=f"s{number}", prompt="how do i make a zorb now", images=(noise_image(number),), kind="harmful")
    for number in range(4)
]
