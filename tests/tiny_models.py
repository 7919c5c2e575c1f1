"""Tiny random models of the real classes with real processors, made in memory for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from exitsafe.engine.vlm import VLM
from exitsafe.exits.checks import Checks

WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "left",
    "shape",
    "how",
    "do",
    "i",
    "make",
    "a",
    "red",
    "blue",
    "green",
    "round",
    "square",
    "zorb",
    "flim",
    "not",
    "now",
    "then",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|image|>", "<|python_tag|>", "USER:", "ASSISTANT:"]
VOCAB = {word: index for index, word in enumerate(SPECIAL + WORDS)}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'USER:' if m['role'] == 'user' else 'ASSISTANT:' }} "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NUM_LAYERS = 6


def tiny_tokenizer(image_token: str = "<image>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[image_token],
        extra_special_tokens={"image_token": image_token},
    )


def text_config(**changes: Any) -> LlamaConfig:
    """A language model of two layers, for `VOCAB`."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCAB),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def vision_settings(**changes: Any) -> dict[str, Any]:
    """An encoder of six blocks, for pictures of 28 by 28 pixels."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        **changes,
    }


def spread(model: Any) -> Any:
    """Random weights large enough that layers, images and tokens matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter[0].numel() ** 0.5)
            elif "gate" in name:
                parameter.fill_(0.7)
            elif name.endswith(("bias", "class_embedding", "image_newline")):
                parameter.normal_(0, 0.1)
    # Several ends, so that answers differ in length.
    model.generation_config.eos_token_id = [2, 8, 11, 14, 17, 20, 23, 26]
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_llava(*, vision_feature_layer: int | list[int] = -2, siglip: bool = False, head_dim: int | None = None) -> Any:
    vision = SiglipVisionConfig(**vision_settings()) if siglip else CLIPVisionConfig(**vision_settings())
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(head_dim=head_dim),
        image_token_index=VOCAB["<image>"],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return spread(LlavaForConditionalGeneration(config))


def tiny_llava_next(*, vision_feature_layer: int | list[int] = -2) -> Any:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision_settings()),
        text_config=text_config(),
        image_token_index=VOCAB["<image>"],
        vision_feature_layer=vision_feature_layer,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return spread(LlavaNextForConditionalGeneration(config))


def tiny_mllama() -> Any:
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_LAYERS,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1, 3, 4],
            "vision_output_dim": 128,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={
            "vocab_size": len(VOCAB),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=VOCAB["<|image|>"],
    )
    return spread(MllamaForConditionalGeneration(config))


def tiny_processor(family: str) -> Any:
    size = {"shortest_edge": 28}
    crop = {"height": 28, "width": 28}
    if family == "mllama":
        return MllamaProcessor(
            image_processor=MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4),
            tokenizer=tiny_tokenizer("<|image|>"),
            chat_template=CHAT_TEMPLATE.replace("IMAGE", "<|image|>"),
        )
    template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    images: Any
    if family == "llava_next":
        images = LlavaNextImageProcessorPil(
            size=size, crop_size=crop, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
        )
        return LlavaNextProcessor(
            image_processor=images,
            tokenizer=tiny_tokenizer(),
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "llava-siglip":
        images = SiglipImageProcessorPil(size=crop)
        settings = {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    else:
        images = CLIPImageProcessorPil(size=size, crop_size=crop)
        settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(
        image_processor=images, tokenizer=tiny_tokenizer(), patch_size=14, chat_template=template, **settings
    )


def tiny_model(family: str) -> Any:
    if family == "llava-siglip":
        return tiny_llava(vision_feature_layer=-1, siglip=True)
    return {"llava": tiny_llava, "llava_next": tiny_llava_next, "mllama": tiny_mllama}[family]()


def save_tiny(family: str, folder: Path) -> Path:
    """A checkpoint folder as a user would have it."""
    tiny_model(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    return folder


def skip_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load models without a look at their answers: nf4's kernels need rows of 64 values, more than a tiny model has."""

    def unchecked(vlm: VLM, *, since: float) -> Checks:
        return Checks(encoder=vlm.encoder, exits=(), alone=0, mixed=0, training=0, can_pad=True, seconds=0)

    monkeypatch.setattr("exitsafe.engine.load.run_checks", unchecked)
    monkeypatch.setattr("exitsafe.engine.load.keep_checks", lambda *_: None)


def noise_image(seed: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
