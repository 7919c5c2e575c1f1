"""Tiny models that engines can serve: vLLM's build for CPUs wants attention heads of 32 in a language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from tests import tiny_models
from tests.model_folders import processor_of
from tests.shrunk_configs import FIRST_WORD, VOCAB_SIZE, tiny_config

KINDS = ("organism", "llava", "llava-siglip", "qwen2_5_vl", "smolvlm")
"""All but the last in vLLM; all but Qwen2.5-VL in llama.cpp."""


def served_model(kind: str) -> VLM:
    """The organism, or a random model of one of the other kinds, in float32."""
    if kind == "organism":
        return load_vlm(kind)
    if kind in ("qwen2_5_vl", "smolvlm"):
        config = _with_wide_heads(tiny_config(kind)) if kind == "qwen2_5_vl" else tiny_config(kind)
        return VLM(_random(config), processor_of(kind, config), name=kind)
    return VLM(_llava(siglip=kind == "llava-siglip"), tiny_models.tiny_processor(kind), name=kind)


def _llava(*, siglip: bool) -> Any:
    text = tiny_models.text_config(hidden_size=128, intermediate_size=128, max_position_embeddings=256)
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**tiny_models.vision_settings())
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tiny_models.VOCAB["<image>"],
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return tiny_models.spread(LlavaForConditionalGeneration(config))


def _with_wide_heads(config: Any) -> Any:
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    return config


def _random(config: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_models.spread(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    with torch.no_grad():
        for name in ("image_token_id", "video_token_id"):
            if (placeholder := getattr(config, name, None)) is not None:
                model.lm_head.weight[placeholder] = 0.0  # no trained model answers with one either
    model.generation_config.eos_token_id = [2, *range(FIRST_WORD, VOCAB_SIZE, 7)]
    return model
