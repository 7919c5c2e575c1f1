"""A small random LLaVA whose prompts are as long as a real one's: a picture of 336 px is 576 tokens."""

from __future__ import annotations

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from tests.tiny_models import CHAT_TEMPLATE, VOCAB, WORDS, noise_image, tiny_tokenizer

IMAGE_SIZE, PATCH_SIZE = 336, 14


def long_prompt_vlm(*, width: int, num_layers: int) -> VLM:
    """A language model of `width` and `num_layers`, and a small CLIP tower. Answers never end by themselves."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,  # LLaVA-1.5's proportion
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB["<image>"])
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(model, processor, name="long prompt")


def picture_questions(num_samples: int, *, num_words: int = 20) -> list[Sample]:
    """One picture of noise and `num_words` words each."""
    return [
        Sample(
            id=f"q{index}",
            prompt=" ".join(WORDS[(index + word) % len(WORDS)] for word in range(num_words)),
            images=(noise_image(index, (IMAGE_SIZE, IMAGE_SIZE)),),
            kind="benign",
        )
        for index in range(num_samples)
    ]
