"""The default config of a model type in, the config of a tiny model of the same architecture out.

Rules by the names of config entries shrink every config and its sub-configs; `_EXCEPTIONS` holds what no rule finds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

NUM_LAYERS = 6
"""Blocks of a vision or audio encoder."""
VOCAB_SIZE = 96
FIRST_WORD = 48
"""Special tokens have smaller ids."""
VARIANTS = {"llava_pixtral": "llava"}
"""Not model types of their own, but architectures that their config's default is not."""
_WIDTH = 64
_PATCH = 8
_ROTARY = 8
"""Half of a head's rotated dimensions."""

_PARTS = "hidden|embed|embedding|proj|projection|out|output|text|adapter|projector"
_SIZES = {
    r"(unpadded_)?vocab_size(_per_layer_input)?": VOCAB_SIZE,
    r"max_position_embeddings": 512,
    r"max_source_positions|num_patches|num_position_embeddings|(.*_)?window_size": 16,
    r"(.*_)?image_size|max_img_size": 4 * _PATCH,
    r"patch_size": _PATCH,
    r"n_window": 4,
    r"n_window_infer": 8,
    r"image_seq_length|mm_tokens_per_image|num_query_tokens|(.*_)?(latents|latent_query_num)": 4,
    r"sliding_window": 8,
    r"base_channels": 32,
    r"(.*_)?key_heads": 2,
    r"(?!num_key_value)(.*_)?heads": 4,
    r"(.*_)?(head_dim|dim_head|d_kv)|.*lora_rank": 16,
    r"n_group|topk_group": 1,
    r".*(experts_per_tok|topk|top_k|moe_k|top_k_experts)": 2,
    r"(?!.*shared).*experts": 4,
    r"(.*_)?(intermediate_size|ffn_dim|mlp_dim|d_ff)(_mlp)?": 4 * _WIDTH,
    rf"(.*_)?({_PARTS})(_(in|out|input|output))?_(size|dim)": _WIDTH,
    r"d_model|hidden_size_per_layer_input": _WIDTH,
}
_DEPTHS = ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "layers", "n_layers", "num_blocks")
_COUNTS = "|".join((*_DEPTHS, "decoder_layers", "num_decoder_layers"))
_INDICES = r".*(index(es)?|indices|idxs|layer_ids|_layers)"
_TOKENS = r"(?!.*layer_id).*(_id|_ids|token_index)"


def tiny_config(model_type: str) -> Any:
    """A config of a few hundred thousand weights; see `tests/architectures.py` for what it keeps."""
    changes = dict(_EXCEPTIONS.get(model_type, {}))
    config = AutoConfig.for_model(VARIANTS.get(model_type, model_type), **changes.pop("", {}))
    settings = _shrunk(config, _TokenIds(), path="")
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = settings
        for parent in parents:
            place = place[parent]
        place[name] = value
    return type(config)(**settings)


class _TokenIds:
    """Gives each token of a large vocabulary an id of its own in a small one."""

    def __init__(self) -> None:
        self._ids: dict[object, int] = {}

    def __call__(self, token: int | str) -> int:
        if token in (0, 1, 2):
            return int(token)
        return self._ids.setdefault(token, 3 + len(self._ids))


def _shrunk(config: PretrainedConfig, token_ids: _TokenIds, *, path: str) -> dict[str, Any]:
    # Configs whose layers differ refuse getattr.
    entries = {field.name: vars(config).get(field.name) for field in dataclasses.fields(config) if field.init}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    depth = next((depth for name in _DEPTHS if isinstance(depth := entries.get(name), int)), 0)
    is_encoder = re.search("vision|audio", path) is not None
    kept = list(range(NUM_LAYERS)) if is_encoder else _one_of_each_kind(entries, depth)
    settings: dict[str, Any] = {"model_type": config.model_type} if path and config.model_type else {}
    for name, value in entries.items():
        if isinstance(value, PretrainedConfig):
            settings[name] = _shrunk(value, token_ids, path=f"{path}.{name}")
        elif re.fullmatch("(image|video|audio)_token_(id|index)", name):
            settings[name] = token_ids(name if value is None else value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and (defaults[name] is not None or name == "num_key_value_heads")
        ):
            settings |= _number(name, value, entries, token_ids, num_layers=len(kept))
        elif isinstance(value, dict) and "mrope_section" in value:
            settings[name] = _rope(value)
        elif isinstance(value, list | tuple):
            settings |= _sequence(name, value, depth, kept, token_ids, is_encoder=is_encoder)
    return settings


def _number(
    name: str, value: int, entries: Mapping[str, Any], token_ids: _TokenIds, *, num_layers: int
) -> dict[str, int]:
    if re.fullmatch(_COUNTS, name):
        return {name: num_layers}
    if re.fullmatch(_TOKENS, name):
        return {name: token_ids(value)}
    if name == "num_key_value_heads":
        return {name: 4 if value == entries.get("num_attention_heads") else 2}
    return next(({name: min(size, value)} for rule, size in _SIZES.items() if re.fullmatch(rule, name)), {})


def _one_of_each_kind(entries: Mapping[str, Any], depth: int) -> list[int]:
    """The layers to keep: of each kind the first, and at least two."""
    sequences = {name: value for name, value in entries.items() if isinstance(value, list | tuple) and value}
    per_layer = [value for value in sequences.values() if len(value) == depth and list(value) != list(range(depth))]
    chosen = [value for name, value in sequences.items() if _is_indices(name, value) and len(value) != depth]
    kinds = [repr([value[i] for value in per_layer] + [i in value for value in chosen]) for i in range(depth)]
    firsts = [i for i in range(depth) if kinds.index(kinds[i]) == i]
    others = [i for i in range(depth) if i not in firsts]
    return sorted([*firsts, *others[: max(0, 2 - len(firsts))]])


def _is_indices(name: str, value: Sequence[Any]) -> bool:
    return re.fullmatch(_INDICES, name) is not None and all(isinstance(index, int) for index in value)


def _sequence(
    name: str, value: Sequence[Any], depth: int, kept: list[int], token_ids: _TokenIds, *, is_encoder: bool
) -> dict[str, list[Any]]:
    if re.fullmatch("image_size|patch_size", name) and len(value) == 2:
        return {name: [_SIZES["patch_size"] * (4 if name == "image_size" else 1)] * 2}
    if name == "image_grid_pinpoints":
        return {name: [[32, 64], [64, 32], [64, 64]]}
    if re.fullmatch(_TOKENS, name):
        return {name: [token_ids(token) for token in value]}
    if _is_indices(name, value) and list(value) == list(range(depth)):
        return {name: list(range(len(kept)))}
    if _is_indices(name, value) and all(0 <= index < depth for index in value):
        new = {index * NUM_LAYERS // depth for index in value} if is_encoder else set()
        return {name: sorted(new) if is_encoder else [kept.index(index) for index in value if index in kept]}
    return {name: [value[index] for index in kept]} if len(value) == depth > max(kept, default=0) else {}


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    old = value["mrope_section"]
    new = [size * _ROTARY // sum(old) for size in old]
    return {**value, "mrope_section": [_ROTARY - sum(new[1:]), *new[1:]]}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    }


def _each(prefix: str, **settings: Any) -> dict[str, Any]:
    return {prefix + name: value for name, value in settings.items()}


_QWEN_TOKENS = {"vision_start_token_id": 38, "vision_end_token_id": 39}
_NO_OF_EXPERTS = _each("text_config.", num_experts=4, top_k_experts=2, moe_intermediate_size=48)
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {
        "vocabulary_map": {"<image>": 40, **{f"IMGIMG{letter}Z": 41 + i for i, letter in enumerate("ABCD")}},
        "vq_config.num_embeddings": 4,
    },
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_ocr2": {
        **_each("text_config.", mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2, n_group=1, topk_group=1),
        "vision_config.sam_config.downsample_channels": [_WIDTH, _WIDTH],
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.image_size": 8 * _PATCH},
    "diffusion_gemma": {**_NO_OF_EXPERTS, "text_config.global_head_dim": 32},
    "dots3_note": {
        **_each("text_config.swa_", num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16),
        **_each("text_config.swa_", head_dim=32, qk_nope_head_dim=16, v_head_dim=16),
        "vision_config.adapter_in_dim": _WIDTH,
        "text_config.index_topk": 4,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 40,
            "<|extra_200|>": 41,
            **{f"<|visual token {i:06}|>": 42 + i for i in range(4)},
        },
        **_each("vq_config.", codebook_size=4, hidden_size=128),
    },
    "ernie4_5_vl_moe": {**_mrope(3, 3, 2), "text_config.moe_intermediate_size": [96, 48]},
    "florence2": _each(
        "vision_config.", embed_dim=[32, 32, _WIDTH, _WIDTH], num_heads=[2, 2, 4, 4], num_groups=[2, 2, 4, 4]
    ),
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma4": {"": {"vision_config": {}}, "text_config.global_head_dim": 32},
    "gemma4_unified": {
        "": {"vision_config": {}},
        "text_config.global_head_dim": 32,
        **_each("vision_config.", mm_embed_dim=_WIDTH, output_proj_dims=_WIDTH),
    },
    "glm46v": _mrope(2, 3, 3),
    "glm4v": _mrope(2, 3, 3),
    "glm4v_moe": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "glm5_next": _each("text_config.", index_kpool=2, index_topk=4),
    "glm_ocr": _mrope(2, 3, 3),
    "glmga": _mrope(2, 3, 3),
    "granite4_vision": {
        "deepstack_layer_map": [[-3, 0], [-1, 1]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl": {"text_config.head_dim": 16, **_mrope(2, 2, 2, 2)},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config.projector_input_dim": _WIDTH},
    "inkling_mm_model": {"vision_config.patch_size": 2},
    "llava_pixtral": {
        "": {"vision_config": {"model_type": "pixtral"}},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "minicpm_ocr": {"insert_layer_id": 2, "vision_config.insert_layer_id": 2},
    "minicpmv4_6": {"insert_layer_id": 2, "vision_config.insert_layer_id": 2},
    "minicpmv4_7": {"insert_layer_id": 2, "vision_config.insert_layer_id": 2},
    "mllama": {"vision_config.vision_output_dim": 6 * _WIDTH},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -3]},
    "muse_glimmer": {"out_hidden_size": 4 * _WIDTH},
    "muse_spark": {
        "out_hidden_size": 4 * _WIDTH,
        **_each("audio_config.", patch_sizes=[2] * 6, hidden_sizes=[32] * 6, depths=[1] * 6),
    },
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2, "text_config.n_groups": 2},
    "paddleocr_vl": _mrope(2, 3, 3),
    "qwen2_5_omni_thinker": {**_mrope(2, 3, 3), **_QWEN_TOKENS},
    "qwen2_5_vl": _mrope(2, 3, 3),
    "qwen2_vl": _mrope(2, 3, 3),
    "qwen3_omni_moe_thinker": _QWEN_TOKENS,
    "qwen4_exp": _each("text_config.indexer_", n_heads=4, kv_heads=1, head_dim=16, budget=16, compress_ratio=4),
    "step3p7": {"text_config.sliding_window": 8},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [_WIDTH, _WIDTH]},
    "vibevoice_asr": {f"{kind}_tokenizer_encoder_config.num_filters": 2 for kind in ("acoustic", "semantic")},
    "vipllava": {"vision_feature_layer": [-2, -3, -5, 1]},
}
