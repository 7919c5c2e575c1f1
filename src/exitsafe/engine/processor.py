"""Loads the processor of a model and checks that it fits: config and files in, a processor or a one-line error out.

Processor files are often older than the library, or another model's. Settings that the model's config decides are taken
from there, and synthetic media check the rest before work begins: a prompt must have as many placeholders as the model
makes features. `load_vlm` and `exitsafe doctor` run the same check, on weights or on shapes alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from exitsafe.engine.prompts import Prompt
from exitsafe.engine.reader import Reader
from exitsafe.errors import ModelError, first_line
from exitsafe.exits.checks import fixed_size, wrong_size
from exitsafe.exits.encoder import reads_across
from exitsafe.exits.features import compute_features, num_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.exits.huggingface import MultimodalProcessor

_FILES = ("processor_config.json", "preprocessor_config.json")


def load_processor(source: str, config: PretrainedConfig, **remote: str | bool) -> MultimodalProcessor:
    """The processor of a checkpoint, with the settings that its model's config decides.

    Args:
        source: A Hub id or a folder.
        config: The model's config.
        remote: `revision` and `trust_remote_code`, as for `from_pretrained`.

    Raises:
        ModelError: If it has none, or its files cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        raise ModelError(f"{source} has no processor: copy the processor and tokenizer files next to the weights")
    try:
        processor: MultimodalProcessor = AutoProcessor.from_pretrained(source, **remote)
        own_class: Any = PROCESSOR_MAPPING.get(type(config), None)
        is_stock = type(processor).__module__.startswith("transformers.")
        if own_class is not None and not isinstance(processor, own_class) and is_stock:
            processor = own_class.from_pretrained(source, **remote)  # the files name another model's class
        _take_settings(processor, config)
    except ImportError as error:  # many processors prepare pictures or videos with torchvision
        missing = first_line(error).split(". ")[0]
        raise ModelError(
            f'the processor of {source} needs a package: {missing}; pip install "exitsafe[processors]", with the '
            "torchvision build that matches your torch"
        ) from error
    except Exception as error:  # untrusted files: a missing or wrong entry may raise anything
        raise ModelError(
            f"cannot load the processor of {source}: {first_line(error)}; copy the processor and tokenizer files of "
            "the original checkpoint next to the weights"
        ) from error
    return processor


def _take_settings(processor: MultimodalProcessor, config: PretrainedConfig) -> None:
    """Set what LLaVA's processors count image tokens by, and their files often leave out, from the model's config."""
    vision = getattr(config, "vision_config", None)
    for name, owner in (("patch_size", vision), ("vision_feature_select_strategy", config)):
        if hasattr(processor, name) and hasattr(owner, name):
            setattr(processor, name, getattr(owner, name))
    if hasattr(processor, "num_additional_image_tokens"):
        has_class_token = getattr(vision, "model_type", "") == "clip_vision_model"
        processor.num_additional_image_tokens = int(has_class_token)
    images: Any = getattr(processor, "image_processor", None)
    if hasattr(images, "image_grid_pinpoints") and hasattr(config, "image_grid_pinpoints"):
        images.image_grid_pinpoints = config.image_grid_pinpoints


def check_processor(vlm: Reader) -> list[str]:
    """Check that prompts can be made for this model, with synthetic pictures or audio and one encoder block.

    Args:
        vlm: A model with a processor, with weights or with shapes alone.

    Returns:
        Warnings about the model, a sentence each.

    Raises:
        ModelError: If the processor's prompts or pictures do not fit the model, or its chat template fails.
    """
    # wide and tall: pictures that are not square reveal a missing crop and exercise tiling; larger ones only cost time
    size = min(fixed_size(vlm.base_model) or 112, 448)
    for width, height in ((size * 3 // 2, size), (size, size * 2)):
        prompt = vlm.probe(size=(width, height))
        _check_tokens(vlm, prompt)
        _check_placeholders(vlm, prompt)
    if not vlm.eos_token_ids:
        return [
            f"{vlm.name} has no end-of-sequence token: every answer runs to max_new_tokens, and it cannot be trained"
        ]
    return []


def _check_tokens(vlm: Reader, prompt: Prompt) -> None:
    num_embeddings = vlm.base_model.get_input_embeddings().weight.shape[0]
    if (largest := int(prompt.input_ids.max())) >= num_embeddings:
        raise _misfit(
            vlm,
            f"its tokenizer makes token {largest}, but the model has {num_embeddings} embeddings: use the tokenizer "
            "files of this checkpoint",
        )


def _check_placeholders(vlm: Reader, prompt: Prompt) -> None:
    modality, other_size = vlm.encoder.modality, wrong_size(vlm.base_model, prompt.media)
    try:
        features = compute_features(vlm, prompt.media, (1,), skip_global=False)[1]
    except Exception as error:
        reason = other_size or f"the model cannot read its {modality}s ({first_line(error)})"
        raise _misfit(vlm, reason) from error
    name = f"{modality}_token"
    if (token := getattr(vlm.base_model.config, f"{name}_id", None)) is None:
        return
    count, wanted = int((prompt.input_ids == token).sum()), 1 if reads_across(vlm.base_model) else num_tokens(features)
    given = getattr(vlm.processor, f"{name}_id", None)
    if count == 0 and given != token:
        raise _misfit(
            vlm,
            f"its {modality} token is {getattr(vlm.processor, name, None)!r} with id {given}, but the model's has id "
            f"{token}: use the tokenizer files of this checkpoint",
        )
    if count != wanted:
        reason = (
            f"a prompt has {count} {modality} placeholders, but the model makes {wanted} features: use the chat "
            "template and the processor files of the original checkpoint"
        )
        raise _misfit(vlm, other_size or reason)


def _misfit(vlm: Reader, reason: str) -> ModelError:
    return ModelError(f"the processor of {vlm.name} does not fit the model: {reason}")
