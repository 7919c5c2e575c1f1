"""Loads the processor of a model and checks that it fits: config and files in, a processor or a one-line error out.

Processor files are often older than the library, or another model's. Settings that the model's config decides are taken
from there, and synthetic pictures check the rest before work begins: a prompt must have as many image placeholders as
the model makes features. `load_vlm` and `exitsafe doctor` run the same check, on weights or on shapes alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from exitsafe.engine.prompts import Prompt
from exitsafe.engine.reader import Reader
from exitsafe.errors import InputError, ModelError, first_line
from exitsafe.exits.families import Family
from exitsafe.exits.features import compute_features
from exitsafe.records import Sample

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.exits.huggingface import ImageTextProcessor

_FILES = ("processor_config.json", "preprocessor_config.json")


def load_processor(
    source: str, config: PretrainedConfig, family: Family, **remote: str | bool
) -> ImageTextProcessor | None:
    """The processor of a checkpoint, with the settings that its model's config decides.

    Args:
        source: A Hub id or a folder.
        config: The model's config.
        family: The model's family.
        remote: `revision` and `trust_remote_code`, as for `from_pretrained`.

    Returns:
        The processor; None for a local folder without processor files. On the Hub it is required.

    Raises:
        ModelError: If its files cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        processor: ImageTextProcessor = AutoProcessor.from_pretrained(source, **remote)
        own_class: Any = PROCESSOR_MAPPING[type(config)]
        if not isinstance(processor, own_class) and type(processor).__module__.startswith("transformers."):
            processor = own_class.from_pretrained(source, **remote)  # the files name another model's class
        for path, value in family.processor_settings(config).items():
            owner, _, name = path.rpartition(".")
            setattr(getattr(processor, owner) if owner else processor, name, value)
    except Exception as error:  # untrusted files: a missing or wrong entry may raise anything
        raise ModelError(
            f"cannot load the processor of {source}: {first_line(error)}; copy the processor and tokenizer files of "
            "the original checkpoint next to the weights"
        ) from error
    return processor


def noise_picture(vlm: Reader, generator: torch.Generator) -> dict[str, Tensor]:
    """A processor's tensors for a square picture of noise that fills all tiles, in float32 on the CPU."""
    names, config = vlm.family_row.image_inputs, vlm.base_model.config
    size = config.vision_config.image_size
    if "aspect_ratio_ids" in names:
        num_tiles = config.vision_config.max_num_tiles
        ratios = config.vision_config.supported_aspect_ratios
        fullest = max(range(len(ratios)), key=lambda index: ratios[index][0] * ratios[index][1])
        return {
            "pixel_values": torch.randn(1, 1, num_tiles, 3, size, size, generator=generator),
            "aspect_ratio_ids": torch.tensor([[fullest + 1]]),  # 0 means no picture
            "aspect_ratio_mask": torch.ones(1, 1, num_tiles, dtype=torch.long),
        }
    if "image_sizes" in names:
        height, width = max(config.image_grid_pinpoints, key=lambda point: (point[0] * point[1], -point[0]))
        num_tiles = 1 + (height // size) * (width // size)  # the whole picture is a tile too
        pixels = torch.randn(1, num_tiles, 3, size, size, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}


def check_processor(vlm: Reader) -> list[str]:
    """Check that prompts can be made for this model, with synthetic pictures and one encoder block.

    Args:
        vlm: A model with a processor, with weights or with shapes alone.

    Returns:
        Warnings about the model, a sentence each.

    Raises:
        ModelError: If the processor's prompts or pictures do not fit the model, or its chat template fails.
    """
    _check_image_token(vlm)
    size = int(vlm.base_model.config.vision_config.image_size)
    # wide and tall: pictures that are not square reveal a missing crop and exercise tiling
    for width, height in ((size * 3 // 2, size), (size, size * 2)):
        picture = Image.new("RGB", (width, height), "white")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # issued when real prompts are made
            try:
                prompt = vlm.encode_prompt(Sample(id="check", prompt="a picture", images=(picture,), kind="benign"))
            except (InputError, ModelError) as error:  # about the chat template
                raise ModelError(f"{vlm.name}: {str(error).removeprefix('sample check: ')}") from error
            except Exception as error:
                raise _misfit(
                    vlm,
                    f"it cannot encode a picture with text ({first_line(error)}): use the processor files of the "
                    "original checkpoint",
                ) from error
        _check_tokens(vlm, prompt)
        _check_placeholders(vlm, prompt, size)
    if not vlm.eos_token_ids:
        return [
            f"{vlm.name} has no end-of-sequence token: every answer runs to max_new_tokens, and it cannot be trained"
        ]
    return []


def _check_image_token(vlm: Reader) -> None:
    wanted, given = vlm.base_model.config.image_token_id, vlm.processor.image_token_id
    if wanted != given:
        raise _misfit(
            vlm,
            f"its image token is {vlm.processor.image_token!r} with id {given}, but the model's has id {wanted}: use "
            "the tokenizer files of this checkpoint",
        )


def _check_tokens(vlm: Reader, prompt: Prompt) -> None:
    num_embeddings = vlm.base_model.get_input_embeddings().weight.shape[0]
    if (largest := int(prompt.input_ids.max())) >= num_embeddings:
        raise _misfit(
            vlm,
            f"its tokenizer makes token {largest}, but the model has {num_embeddings} embeddings: use the tokenizer "
            "files of this checkpoint",
        )


def _check_placeholders(vlm: Reader, prompt: Prompt, size: int) -> None:
    count = int((prompt.input_ids == vlm.base_model.config.image_token_id).sum())
    height, width = prompt.image_inputs["pixel_values"].shape[-2:]
    other_size = (
        f"it makes pictures of {width}x{height} pixels, but the image encoder reads {size}x{size}: set the image "
        "processor's size and crop_size to that"
    )
    is_expected = (height, width) == (size, size)
    try:
        features = compute_features(vlm, prompt.image_inputs, (1,), skip_global=False)[1]
    except Exception as error:
        reason = f"the model cannot read its pictures ({first_line(error)})" if is_expected else other_size
        raise _misfit(vlm, reason) from error
    reads_across = bool(vlm.family_row.image_cache_layers(vlm.text_config))
    wanted = 1 if reads_across else sum(image.shape[0] for image in features)
    if count != wanted:
        reason = (
            f"a prompt has {count} image placeholders, but the model makes {wanted} features: use the chat template "
            "and the processor files of the original checkpoint"
        )
        raise _misfit(vlm, reason if is_expected else other_size)


def _misfit(vlm: Reader, reason: str) -> ModelError:
    return ModelError(f"the processor of {vlm.name} does not fit the model: {reason}")
