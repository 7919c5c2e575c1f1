"""The organisms' architecture: a seed in, an untrained LLaVA and its processor out.

Real Hugging Face classes, tiny: a CLIP tower of 8 blocks (width 64, 32 px, patch 16: 4 image tokens), a Llama of
3 layers (width 128), 1.06 million parameters. The default exit is 7 of 8 blocks (`vision_feature_layer=-2`).
"""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from exitsafe.world.language import vocabulary
from exitsafe.world.pictures import CELL_SIZE, PICTURE_SIZE

NUM_BLOCKS = 8
DEFAULT_EXIT = 7
PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PIXEL_MEAN, PIXEL_STD = 0.12, 0.25
"""Close to those of the pictures, so that the dark background, most of a picture, is around 0."""
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] + ' :' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_model(*, seed: int) -> LlavaForConditionalGeneration:
    """An untrained organism in fp32; the same seed gives the same weights."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=CELL_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(vocabulary()),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index(IMAGE),
        image_seq_length=(PICTURE_SIZE // CELL_SIZE) ** 2,
        vision_feature_layer=DEFAULT_EXIT - NUM_BLOCKS - 1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _widen_init(model)
    model.generation_config = GenerationConfig(
        pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id
    )
    return model


def build_processor() -> LlavaProcessor:
    """The word-level tokenizer, the CLIP image processor (PIL backend) and the chat template, all built in memory."""
    words = (*SPECIAL_TOKENS, *vocabulary())
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=CELL_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _widen_init(model: nn.Module) -> None:
    """Widen the default initialisation, which is for widths near 1000: at 64 and 128 the signal would vanish."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
