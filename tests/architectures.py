"""Tiny random models of every architecture that transformers registers for pictures or sound with text.

A model type goes in; a model in float32 with six encoder blocks and a text layer of each kind comes out, with the
inputs that its processor would return for one prompt with one picture.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.shrunk_configs import FIRST_WORD, VARIANTS, VOCAB_SIZE, tiny_config

FAMOUS = (
    "gemma3",
    "gemma4",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)
"""The model types of a default test run; the slow run takes all."""
_NO_TIMM = "requires the timm library"
_NO_FEATURES = "no get_image_features"
NOT_RUN = {
    "blip": _NO_FEATURES,
    "evolla": _NO_FEATURES,
    "fast_vlm": _NO_TIMM,
    "fun_asr_nano": _NO_FEATURES,
    "gemma3n": _NO_TIMM,
    "git": _NO_FEATURES,
    "glmasr": _NO_FEATURES,
    "granite_speech": _NO_FEATURES,
    "granite_speech_plus": _NO_FEATURES,
    "idefics": _NO_FEATURES,
    "instructblipvideo": _NO_FEATURES,
    "kosmos-2": _NO_FEATURES,
    "kosmos-2.5": _NO_FEATURES,
    "kyutai_speech_to_text": "in_channels must be divisible by groups",
    "mistral4": _NO_FEATURES,
    "moss_transcribe_diarize": _NO_FEATURES,
    "nemo_speechlm": _NO_FEATURES,
    "perception_lm": _NO_TIMM,
    "phi4_multimodal": _NO_FEATURES,
    "pi0": "missing 1 required positional argument: 'state'",
    "pix2struct": _NO_FEATURES,
    "pp_formulanet": _NO_FEATURES,
    "qwen2_5_omni": "`get_input_embeddings` not auto",
    "qwen2_audio": _NO_FEATURES,
    "qwen3_asr": _NO_FEATURES,
    "qwen3_omni_moe": "has no attribute 'shared_expert_intermediate_size'",
    "udop": _NO_FEATURES,
    "vibevoice_asr": _NO_FEATURES,
    "vision-encoder-decoder": _NO_FEATURES,
    "voxtral": _NO_FEATURES,
    "voxtral_realtime": _NO_FEATURES,
}
"""Model types that cannot be built tiny or whose language model does not run on a picture, with part of the error."""
GRID = (4, 8)
"""Patches of a picture, down and across, for the models that take pictures of any size."""
_VIDEO_NAMES = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
_FRAMES = 32
"""Frames of a sound."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny model and what a processor would return for one prompt.

    Attributes:
        model: In eval mode.
        inputs: Of the model's forward.
        image_inputs: The names of those inputs that `get_image_features` (or `get_audio_features`, ...) takes.
    """

    model: Any
    inputs: dict[str, Any]
    image_inputs: tuple[str, ...]


def model_types() -> list[str]:
    """All model types of the two auto classes, and a variant whose default config is of another architecture."""
    return sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *VARIANTS})


def parametrized(model_types: Iterable[str]) -> list[Any]:
    """Arguments of `pytest.mark.parametrize`: the famous in the default run, the others in the slow one."""
    return [pytest.param(name, marks=[] if name in FAMOUS else pytest.mark.slow) for name in model_types]


def tiny(model_type: str, seed: int = 0, *, modality: str = "image") -> Tiny:
    """A tiny model with one prompt.

    Args:
        modality: "image", "video" or "audio": what the prompt contains besides text.

    Raises:
        LookupError: If the model has no `get_image_features`.
    """
    model = tiny_model(model_type, seed)
    inputs = tiny_inputs(model, seed, modality=modality)
    return Tiny(model=model, inputs=inputs, image_inputs=tuple(_encoder_inputs(model, modality)))


def tiny_model(model_type: str, seed: int = 0, *, change: Callable[[Any], object] = lambda config: None) -> Any:
    """The model alone, with random weights large enough that layers, pictures and tokens matter; `change` may change
    its config."""
    config = tiny_config(model_type)
    change(config)
    model_class = getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VARIANTS.get(model_type, model_type)])
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                fan_in = weight.shape[-1] if "experts" in name else weight[0].numel()
                weight.normal_(0, 0.8 / fan_in**0.5)
            elif name.endswith(("bias", "class_embedding", "image_newline")):
                weight.normal_(0, 0.1)
            elif "gate" in name:
                weight.fill_(0.7)
    return model.eval()


def tiny_inputs(model: Any, seed: int = 0, num_words: int = 5, *, modality: str = "image") -> dict[str, Any]:
    """The inputs of the model's forward for one prompt with one picture (video, sound) and `num_words` words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder_inputs = _encoder_inputs(model, modality)
        words = torch.randint(FIRST_WORD, VOCAB_SIZE, (num_words,)).tolist()
    return _prompt(model, encoder_inputs, words, modality)


def features_owner(model: nn.Module, modality: str = "image") -> Any:
    """The outermost module whose `get_image_features` (`get_video_features`, `get_audio_features`) names its arguments.

    Some outer ones pass on `*args`, and VideoLLaMA 3's lacks one that the inner one needs.
    """
    owners = [module for module in model.modules() if hasattr(module, f"get_{modality}_features")]
    if not owners:
        raise LookupError(f"no get_{modality}_features")
    needed = {name for name, has_default in _arguments(owners[-1], modality).items() if not has_default}
    return next(owner for owner in owners if needed <= _arguments(owner, modality).keys())


def _arguments(owner: Any, modality: str) -> dict[str, bool]:
    parameters = inspect.signature(getattr(owner, f"get_{modality}_features")).parameters.values()
    return {each.name: each.default is not each.empty for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD}


def _encoder_inputs(model: Any, modality: str) -> dict[str, Any]:
    model_type = model.config.model_type
    if model_type == "mllama" and modality == "image":
        return _mllama_inputs(model.config.vision_config)
    if model_type == "qwen2_audio" and modality == "audio":
        return _sound(model.config.audio_config, {"input_features", "feature_attention_mask"})
    names = set(_arguments(features_owner(model, modality), modality))
    if modality == "audio":
        if getattr(model.config, "audio_config", model.config) is None:
            raise LookupError("no encoder of sound")
        return _sound(_first(model.config, "audio_config", "encoder_config"), names)
    config = _first(model.config, "vlm_config", "thinker_config", "encoder") or model.config
    vision = _first(config, "vision_config") or config
    if vision.model_type == "pixtral":
        names |= {"image_sizes"}  # LLaVA takes them among the keyword arguments
    if modality == "video":
        inputs = _picture(model_type, config, vision, {name.replace("video", "image") for name in names})
        if "image_grid_thw" in inputs:
            pixels = torch.cat([inputs["pixel_values"], torch.randn_like(inputs["pixel_values"])])
            inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[2, *GRID]])}
        return {_VIDEO_NAMES[name]: value for name, value in inputs.items()}
    return _picture(model_type, config, vision, names)


def _picture(model_type: str, config: Any, vision: Any, names: set[str]) -> dict[str, Any]:
    """One picture in the form that the arguments of `get_image_features` call for."""
    patch = vision.patch_size if isinstance(getattr(vision, "patch_size", None), int) else 8
    size = {"florence2": 64}.get(model_type, 32)
    picture = torch.randn(1, 3, size, size)
    num_patches = math.prod(GRID)
    flat = torch.randn(num_patches, 3 * patch**2)
    match model_type:
        case "molmo2":
            pooling = [[row + column for row in (i, i + 4) for column in (0, 1)] for i in (0, 2, 8, 10)]
            grids = torch.tensor([[2, 2, 0, 0]])
            return {"pixel_values": flat[None, :16], "image_token_pooling": torch.tensor(pooling), "image_grids": grids}
        case "inkling2":
            grid = torch.tensor([[1, GRID[0] // 2, GRID[1] // 2]])
            return {"pixel_values": torch.randn(num_patches // 4, 2 * patch, 2 * patch, 3), "image_grid_thw": grid}
        case "inkling_mm_model":
            return {"pixel_values": torch.randn(4, vision.temporal_patch_size, patch, patch, 3)}
        case "fuyu":
            return {"pixel_values": flat[None]}
        case "granite_docling":
            return {"pixel_values": picture[None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    if "image_grid_thw" in names:
        time = _first(vision, "temporal_patch_size", "patch_temporal") or 1
        shape = (3, patch, patch) if model_type in ("kimi_k25", "paddleocr_vl") else (3 * time * patch**2,)
        sizes = {"image_merge_sizes": torch.tensor([1])} if "image_merge_sizes" in names else {}
        return {"pixel_values": torch.randn(num_patches, *shape), "image_grid_thw": torch.tensor([[1, *GRID]]), **sizes}
    if "image_grid_hw" in names:
        return {"pixel_values": flat, "image_grid_hw": torch.tensor([GRID])}
    if "spatial_shapes" in names:
        mask = torch.ones(1, num_patches, dtype=torch.long)
        return {"pixel_values": flat[None], "spatial_shapes": torch.tensor([GRID]), "pixel_attention_mask": mask}
    if "target_sizes" in names:
        return {"pixel_values": torch.randn(1, 3, patch, num_patches * patch), "target_sizes": torch.tensor([GRID])}
    if "image_position_ids" in names:
        kernel = vision.pooling_kernel_size
        side, patch = (2, patch * kernel) if model_type == "gemma4_unified" else (2 * kernel, patch)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
        return {"pixel_values": torch.rand(1, side**2, 3 * patch**2), "image_position_ids": places}
    if "high_res_pixel_values" in names:
        return {"pixel_values": picture, "high_res_pixel_values": torch.randn(1, 3, 2 * size, 2 * size)}
    if "qformer_input_ids" in names:
        words = torch.randint(FIRST_WORD, VOCAB_SIZE, (1, 4))
        return {"pixel_values": picture, "qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    if "pixel_mask" in names:
        return {"pixel_values": picture, "pixel_mask": torch.ones(1, size, size, dtype=torch.bool)}
    if "pixel_attention_mask" in names:
        mask = torch.ones(1, 1, size, size, dtype=torch.bool)
        return {"pixel_values": picture[None], "pixel_attention_mask": mask}
    if "image_sizes" in names and getattr(config, "image_grid_pinpoints", None):
        return {"pixel_values": torch.randn(1, 3, 3, size, size), "image_sizes": torch.tensor([[size, 2 * size]])}
    if "image_sizes" in names:
        return {"pixel_values": picture, "image_sizes": torch.tensor([[size, size]])}
    if "pixel_values_images" in names:
        return {"pixel_values": torch.randn(1, 2, 3, size, size)}
    return {"pixel_values": picture}


def _mllama_inputs(vision: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (vision.max_num_tiles - 1)]]),
    }


def _sound(audio: Any, names: set[str]) -> dict[str, Any]:
    num_bins = _first(audio, "num_mel_bins", "input_dim", "feature_size")
    if num_bins is None:
        raise NotImplementedError("its audio is not a spectrogram")
    inputs = {"input_features": torch.randn(1, num_bins, _FRAMES)}
    masks = names & {"input_features_mask", "feature_attention_mask"}
    return inputs | {name: torch.ones(1, _FRAMES, dtype=torch.long) for name in masks}


def _prompt(model: Any, encoder_inputs: dict[str, Any], words: list[int], modality: str) -> dict[str, Any]:
    config = model.config
    placeholder = _first(getattr(config, "vlm_config", config), f"{modality}_token_id", f"{modality}_token_index")
    kind = "audio" if modality == "audio" else "vision"
    start, end = ([getattr(config, f"{kind}_{edge}_token_id", None)] for edge in ("start", "end"))
    num_parts = (
        2 if modality == "video" and config.model_type.startswith(("qwen3_vl", "qwen3_5")) else 1
    )  # a part per frame
    part = [*start, *[placeholder] * (_num_features(model, encoder_inputs, modality) // num_parts), *end]
    tokens = [1, *[token for token in part * num_parts if token is not None], *words]
    input_ids = torch.tensor([tokens])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **encoder_inputs}
    names = inspect.signature(model.forward).parameters
    is_placeholder = (input_ids == placeholder).long() * (2 if modality == "video" else 1)
    inputs |= {
        name: is_placeholder
        for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
        if name in names
    }
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[1, *words[:2]]])
    if config.model_type == "mllama":
        inputs["cross_attention_mask"] = encoder_inputs["aspect_ratio_mask"][:, None].expand(-1, len(tokens), -1, -1)
    return inputs


@torch.no_grad()
def _num_features(model: Any, encoder_inputs: Mapping[str, Any], modality: str) -> int:
    """The number of placeholders that the prompt needs, measured."""
    if model.config.model_type == "mllama":
        return 1
    if model.config.model_type == "qwen2_audio":
        return _FRAMES // 4
    features = getattr(features_owner(model, modality), f"get_{modality}_features")(**encoder_inputs)
    return _count(features, model.get_input_embeddings().weight.shape[1])


def _count(features: Any, width: int) -> int:
    if not isinstance(features, Tensor | list | tuple):
        return _count(_first(features, "pooler_output", "last_hidden_state", "deepstack_features"), width)
    if isinstance(features, Tensor):
        return features.numel() // width
    if isinstance(features[0], tuple):
        return _count(features[0][1], width)  # Granite 4 Vision: pairs of a text layer and the features that it adds
    return sum(_count(part, width) for part in features)


def _first(owner: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)
