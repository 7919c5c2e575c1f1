"""What differs between model families: where the encoder blocks are, how the model's own code is told about an exit,
and how image features are computed and passed to the language model.

A family is one row of `FAMILIES`, keyed by the model type and its vision tower's type; Llama 3.2 Vision, whose
language model reads the image by cross-attention, needs the subclass below. No other code refers to a family by name.
To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from exitsafe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.exits.huggingface import ImageTextModel

ExitSettings = dict[str, int | list[int]]
"""Entries of a model's config, by name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """LLaVA and similar models: one block list, `vision_feature_layer`, features scattered over image tokens.

    Args:
        name: The model type in the checkpoint's config.
        vision: The model type of its vision tower.
        blocks: Path from the model to the list of encoder blocks.
        image_inputs: The processor's outputs for images.
        plain_prompt: The prompt format for a processor that has no chat template.
        projector: Path to the module that reads an exit's features, token by token; None if they pass further blocks
            before it.
    """

    name: str
    vision: str
    blocks: str = "model.vision_tower.encoder.layers"
    image_inputs: tuple[str, ...] = ("pixel_values",)
    plain_prompt: str = "USER: {images}{prompt} ASSISTANT:"
    projector: str | None = "model.multi_modal_projector"

    def encoder_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The encoder's blocks, in order."""
        return _block_list(model, self.blocks)

    def global_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Blocks that run after the encoder at every exit unless skipped; none in most families."""
        return []

    def default_exit(self, config: PretrainedConfig, num_layers: int) -> int:
        """The exit whose features the untouched model reads."""
        return max(_absolute(config.vision_feature_layer, num_layers))

    def exit_settings(self, config: PretrainedConfig, num_layers: int, exit_layer: int) -> ExitSettings:
        """Config entries with which the model's own code reads the features of `exit_layer`."""
        wanted = [min(index, exit_layer) for index in _absolute(config.vision_feature_layer, num_layers)]
        # A single index follows the exit, also past the default; a list keeps its shallower entries.
        return {"vision_feature_layer": exit_layer if isinstance(config.vision_feature_layer, int) else wanted}

    def processor_settings(self, config: PretrainedConfig) -> dict[str, object]:
        """Processor attributes that the model's config decides, whatever the processor's own files say."""
        settings = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": 1 if self.vision == "clip_vision_model" else 0,  # CLIP's class token
        }
        if self.name == "llava_next":
            settings["image_processor.image_grid_pinpoints"] = config.image_grid_pinpoints
        return settings

    def features(self, model: ImageTextModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the model's own feature path. One tensor (tokens, H) per image."""
        return tuple(model.get_image_features(**inputs, return_dict=True).pooler_output or ())

    def feature_inputs(self, features: Sequence[tuple[Tensor, ...]]) -> dict[str, object]:
        """Keyword arguments that pass the features of a batch's rows to the model's `forward`."""
        images = [image for row in features for image in row]
        if not images:
            return {}
        # A fresh object each time: `generate` with several return sequences changes it in place.
        outputs = BaseModelOutputWithPooling(pooler_output=cast(torch.FloatTensor, images))
        return {"mm_encoder_outputs": {"image": outputs}}

    def images_per_prompt(self, inputs: Mapping[str, Tensor]) -> int:
        """The number of entries of `features` for one prompt's image inputs."""
        return int(inputs["pixel_values"].shape[0])

    def batch_key(self, inputs: Mapping[str, Tensor]) -> object:
        """Prompts may share a batch when their keys are equal."""
        return None

    def image_cache_layers(self, text_config: PretrainedConfig) -> frozenset[int]:
        """Layers of the language model's cache that hold image states, of one width, instead of text states."""
        return frozenset()

    def num_image_states(self, config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> int:
        """The number of states that one prompt's images take in each of these layers."""
        return 0

    def collate_images(self, inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join the image inputs of several prompts."""
        return {name: torch.cat(_pad_tiles([item[name] for item in inputs])) for name in self.image_inputs}


@dataclass(frozen=True, kw_only=True)
class Mllama(Family):
    """Llama 3.2 Vision: exits are after local blocks, gated global blocks follow; read by cross-attention.

    The features of a prompt are its cross-attention states, (images * tiles, patches, H). The model also reads states
    of intermediate blocks; skipped blocks pass on the exit's state, so those past the exit equal it.
    """

    projector: str | None = None
    global_path: str = "model.vision_model.global_transformer.layers"

    def global_blocks(self, model: nn.Module) -> list[nn.Module]:
        return _block_list(model, self.global_path)

    def default_exit(self, config: PretrainedConfig, num_layers: int) -> int:
        return num_layers

    def exit_settings(self, config: PretrainedConfig, num_layers: int, exit_layer: int) -> ExitSettings:
        return {}

    def processor_settings(self, config: PretrainedConfig) -> dict[str, object]:
        return {}

    def features(self, model: ImageTextModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        vision_model = model.get_submodule("model.vision_model")
        states = vision_model(**inputs).last_hidden_state  # (B, images, tiles, patches, 6 * D)
        projected: Tensor = model.get_submodule("model.multi_modal_projector")(states)
        return tuple(projected.flatten(1, 2).unbind(0))

    def feature_inputs(self, features: Sequence[tuple[Tensor, ...]]) -> dict[str, object]:
        rows = [states for row in features for states in row]
        return {"cross_attention_states": torch.cat(rows)} if rows else {}

    def images_per_prompt(self, inputs: Mapping[str, Tensor]) -> int:
        return 1

    def image_cache_layers(self, text_config: PretrainedConfig) -> frozenset[int]:
        return frozenset(text_config.cross_attention_layers)

    def num_image_states(self, config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> int:
        if not inputs:
            return 0
        _, num_images, num_tiles, _, height, width = inputs["pixel_values"].shape
        patch = config.vision_config.patch_size
        return int(num_images * num_tiles * ((height // patch) * (width // patch) + 1))  # each with a class token

    def batch_key(self, inputs: Mapping[str, Tensor]) -> object:
        # Text before the first image attends evenly to all image slots, so an empty slot beside a row with more
        # images would change that row's logits.
        return inputs["pixel_values"].shape[1] if inputs else 0


_LLAVA_NEXT_INPUTS = ("pixel_values", "image_sizes")

FAMILIES: dict[tuple[str, str], Family] = {
    (family.name, family.vision): family
    for family in (
        Family(name="llava", vision="clip_vision_model"),
        Family(name="llava", vision="siglip_vision_model"),
        Family(name="llava_next", vision="clip_vision_model", image_inputs=_LLAVA_NEXT_INPUTS),
        Mllama(
            name="mllama",
            vision="mllama_vision_model",
            blocks="model.vision_model.transformer.layers",
            image_inputs=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
            plain_prompt="{images}<|begin_of_text|>{prompt}",
        ),
    )
}


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, by its config.

    Raises:
        ModelError: If it is not supported; the message names the supported families.
    """
    vision = getattr(getattr(config, "vision_config", None), "model_type", "none")
    family = FAMILIES.get((config.model_type, vision))
    if family is None:
        supported = ", ".join(sorted(f"{name} ({tower})" for name, tower in FAMILIES))
        raise ModelError(
            f"model type {config.model_type!r} with vision tower {vision!r} is not supported; choose a model of one of "
            f"these types: {supported}"
        )
    return family


def _block_list(model: nn.Module, path: str) -> list[nn.Module]:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def _absolute(layers: int | Sequence[int], num_layers: int) -> list[int]:
    """`vision_feature_layer` as indices into the hidden states, 0 being the embeddings."""
    indices = [layers] if isinstance(layers, int) else list(layers)
    return [index if index >= 0 else num_layers + 1 + index for index in indices]


def _pad_tiles(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zero-pad dimension 1 (tiles of LLaVA-NeXT) of 5-dimensional tensors to the largest; leave others unchanged."""
    if tensors[0].dim() != 5:
        return list(tensors)
    most = max(tensor.shape[1] for tensor in tensors)
    return [nn.functional.pad(t, (0, 0) * 3 + (0, most - t.shape[1])) for t in tensors]
