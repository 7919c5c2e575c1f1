"""Checkpoint folders as users have them: a tiny random model, its real processor, a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.architectures import tiny_model
from tests.shrunk_configs import FIRST_WORD, VOCAB_SIZE
from tests.tiny_models import WORDS, save_tiny

hf: Any = transformers
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'USER:' if m['role'] == 'user' else 'ASSISTANT:' }} "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% elif c['type'] == 'video' %}VIDEO "
    "{% elif c['type'] == 'audio' %}AUDIO {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SOUND = ("glmasr", "qwen2_5_omni_thinker", "qwen2_audio")
"""The model types with sound of which `save_tiny_folder` saves a folder."""
_SIZE = {"height": 32, "width": 32}
_AROUND_TILES = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n", "\n\n")
_TILES = [[32, 64], [64, 32], [64, 64]]


def kinds() -> tuple[str, ...]:
    """The model types with pictures of which `save_tiny_folder` saves a folder."""
    return (*(kind for kind in _PROCESSORS if kind not in SOUND), "llava", "mllama")


def save_tiny_folder(kind: str, folder: Path, *, change: Callable[[Any], object] = lambda config: None) -> Path:
    """Save a tiny model of a type with its processor, for pictures of 28 to 112 pixels or a second of sound; `change`
    may change the config of a type that `tiny_models.py` does not make."""
    if kind not in _PROCESSORS:
        return save_tiny(kind, folder)
    model = tiny_model(kind, change=change)
    with torch.no_grad():
        for name in ("image_token_id", "video_token_id", "audio_token_id"):
            if (placeholder := getattr(model.config, name, None)) is not None:
                model.get_output_embeddings().weight[placeholder] = 0.0  # no trained model answers with one either
    # Several ends, so that answers differ in length.
    model.generation_config.eos_token_id = [2, *range(FIRST_WORD, VOCAB_SIZE, 7)]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor_of(kind, model.config).save_pretrained(folder)
    return folder


def processor_of(kind: str, config: Any) -> Any:
    """The processor of a model type, for a config with the tokens of `tests.shrunk_configs`."""
    return _PROCESSORS[kind](config)


def _tokenizer(
    special: dict[str, tuple[str, int]], more: tuple[str, ...] = (), *, is_byte_level: bool = False
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose special tokens have the ids of the config.

    Args:
        special: Names of the tokenizer's attributes ("image_token"), with their tokens and ids.
        more: Further tokens that the processor writes into prompts.
        is_byte_level: Whether transformers loads it as a byte-level one, whatever it was: only added tokens are still
            words then, and are decoded without spaces.
    """
    tokens = {"<pad>": 0, "<s>": 1, "</s>": 2} | dict(special.values())
    words = {word: FIRST_WORD + place for place, word in enumerate(WORDS)}
    last = dict(zip(("<unk>", "USER:", "ASSISTANT:", *more), range(FIRST_WORD - 1, 0, -1), strict=False))
    assert not set(tokens.values()) & set(last.values())
    vocabulary = tokens | last | words
    fillers = {f"<unused{i}>": i for i in range(VOCAB_SIZE) if i not in vocabulary.values()}
    backend = Tokenizer(models.WordLevel(vocabulary | fillers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*tokens, *more])
    if is_byte_level:
        backend.add_tokens([AddedToken(word, lstrip=True) for word in ("USER:", "ASSISTANT:", *WORDS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={name: token for name, (token, _) in special.items()},
    )


def _template(image: str = "", video: str = "", audio: str = "") -> str:
    return _CHAT_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video).replace("AUDIO", audio)


def _qwen(name: str, video_processor: str) -> Callable[[Any], Any]:
    def build(config: Any) -> Any:
        tokens = {
            "image_token": ("<|image_pad|>", config.image_token_id),
            "video_token": ("<|video_pad|>", config.video_token_id),
            "vision_start_token": ("<|vision_start|>", config.vision_start_token_id),
            "vision_end_token": ("<|vision_end|>", config.vision_end_token_id),
        }
        grid = {"patch_size": 8, "size": {"shortest_edge": 16**2, "longest_edge": 64**2}}
        start, end = "<|vision_start|>", "<|vision_end|>"
        return getattr(hf, name)(
            image_processor=hf.Qwen2VLImageProcessor(**grid),
            tokenizer=_tokenizer(tokens, is_byte_level=config.model_type == "qwen3_5"),
            video_processor=getattr(hf, video_processor)(**grid),
            chat_template=_template(f"{start}<|image_pad|>{end}", f"{start}<|video_pad|>{end}"),
        )

    return build


def _smolvlm(config: Any) -> Any:
    places = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    tokens = {"image_token": ("<image>", config.image_token_id)}
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    return hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**sizes),
        tokenizer=_tokenizer(tokens, (*_AROUND_TILES, *places)),
        video_processor=hf.SmolVLMVideoProcessor(**sizes, num_frames=4, fps=1),
        image_seq_len=4,
        chat_template=_template("<image>", "<video>"),
    )


def _gemma3(config: Any) -> Any:
    tokens = {
        "image_token": ("<image_soft_token>", config.image_token_id),
        "boi_token": ("<start_of_image>", config.boi_token_index),
        "eoi_token": ("<end_of_image>", config.eoi_token_index),
    }
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessorPil(size=_SIZE),
        tokenizer=_tokenizer(tokens),
        image_seq_length=config.mm_tokens_per_image,
        chat_template=_template("<start_of_image>"),
    )


def _internvl(config: Any) -> Any:
    tokens = {
        "context_image_token": ("<IMG_CONTEXT>", config.image_token_id),
        "start_image_token": ("<img>", 40),
        "end_image_token": ("</img>", 41),
        "video_token": ("<video>", 42),
    }
    return hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=_SIZE, max_patches=4),
        tokenizer=_tokenizer(tokens),
        video_processor=hf.InternVLVideoProcessor(size=_SIZE),
        image_seq_length=4,
        chat_template=_template("<IMG_CONTEXT>", "<video>"),
    )


def _llava_onevision(config: Any) -> Any:
    tokens = {
        "image_token": ("<image>", config.image_token_id),
        "video_token": ("<video>", config.video_token_id),
    }
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=_SIZE, image_grid_pinpoints=_TILES),
        tokenizer=_tokenizer(tokens),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=_SIZE),
        num_image_tokens=16,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=_template("<image>", "<video>"),
    )


def _mistral3(config: Any) -> Any:
    tokens = {"image_token": ("[IMG]", config.image_token_id)}
    patch = {"height": 8, "width": 8}
    return hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=patch),
        tokenizer=_tokenizer(tokens, ("[IMG_BREAK]", "[IMG_END]")),
        patch_size=8,
        spatial_merge_size=config.spatial_merge_size,
        chat_template=_template("[IMG]"),
    )


def _paligemma(config: Any) -> Any:
    images = hf.SiglipImageProcessorPil(size=_SIZE)
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(
        image_processor=images,
        tokenizer=_tokenizer({"image_token": ("<image>", config.image_token_id)}),
        chat_template=_template("<image>").removeprefix("{{ bos_token }}"),  # the processor adds it after the pictures
    )


def _lfm2_vl(config: Any) -> Any:
    tokens = {
        "image_token": ("<image>", config.image_token_id),
        "image_start_token": ("<|image_start|>", 30),
        "image_end_token": ("<|image_end|>", 31),
        "image_thumbnail_token": ("<|img_thumbnail|>", 32),
    }
    places = tuple(
        f"<|img_row_{row}_col_{column}|>" for row, column in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2))
    )
    return hf.Lfm2VlProcessor(
        image_processor=hf.Lfm2VlImageProcessor(
            tile_size=32, encoder_patch_size=8, min_image_tokens=2, max_image_tokens=4, max_tiles=4, size=_SIZE
        ),
        tokenizer=_tokenizer(tokens, places),
        chat_template=_template("<image>"),
    )


def _glmasr(config: Any) -> Any:
    token = "<|pad|>"
    return hf.GlmAsrProcessor(
        feature_extractor=_whisper(config.audio_config),
        tokenizer=_tokenizer({"audio_token": (token, config.audio_token_id)}),
        chat_template=_template(audio=token),
    )


def _qwen2_audio(config: Any) -> Any:
    tokens = {
        "audio_token": ("<|AUDIO|>", config.audio_token_id),
        "audio_bos_token": ("<|audio_bos|>", 40),
        "audio_eos_token": ("<|audio_eos|>", 41),
    }
    return hf.Qwen2AudioProcessor(
        feature_extractor=_whisper(config.audio_config),
        tokenizer=_tokenizer(tokens),
        chat_template=_template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )


def _omni(config: Any) -> Any:
    vision = config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    tokens = {
        "image_token": ("<|IMAGE|>", config.image_token_id),
        "video_token": ("<|VIDEO|>", config.video_token_id),
        "audio_token": ("<|AUDIO|>", config.audio_token_id),
        "vision_bos_token": ("<|vision_bos|>", 40),
        "vision_eos_token": ("<|vision_eos|>", 41),
        "audio_bos_token": ("<|audio_bos|>", 42),
        "audio_eos_token": ("<|audio_eos|>", 43),
    }
    return hf.Qwen2_5OmniProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes, min_pixels=28 * 28, max_pixels=64 * 64),
        video_processor=hf.Qwen2VLVideoProcessor(**sizes),
        feature_extractor=_whisper(config.audio_config),
        tokenizer=_tokenizer(tokens),
        chat_template=_template(
            "<|vision_bos|><|IMAGE|><|vision_eos|>",
            "<|vision_bos|><|VIDEO|><|vision_eos|>",
            "<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )


def _whisper(audio: Any) -> Any:
    """Features of 32 frames, the length of a second."""
    return hf.WhisperFeatureExtractor(feature_size=audio.num_mel_bins, hop_length=500, chunk_length=1)


_PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "gemma3": _gemma3,
    "glmasr": _glmasr,
    "internvl": _internvl,
    "lfm2_vl": _lfm2_vl,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "qwen2_5_omni_thinker": _omni,
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_audio": _qwen2_audio,
    "qwen3_5": _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "smolvlm": _smolvlm,
}
