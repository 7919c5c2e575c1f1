"""`ExitingModel`: a vision-language model that can exit its image encoder early.

A thin wrapper around the Hugging Face model, which stays untouched: outside `exit_at` it behaves as loaded. Prompts and
answers are handled by `exitsafe.engine`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from peft import PeftModel

from exitsafe.errors import InputError
from exitsafe.exits.cut import ConfigEntry, ExitStack, Hook, skip_patch
from exitsafe.exits.encoder import Encoder, block_list, global_blocks
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exits.translators import Translators, find_projector

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from exitsafe.exits.huggingface import MultimodalModel


class ExitingModel:
    """A model whose image features can be read after any encoder block.

    Args:
        model: A Hugging Face model, or a PEFT model around one.
        encoder: Where its encoder is, from `exitsafe.exits.checks.prove_exits`.
        name: What the model was loaded from.
        checkpoint_hash: Identifies the weights, config and processor files.
        adapter_hash: Identifies the PEFT adapter, if there is one.
        translators: Optional linear maps, one per exit, applied to the features before the projector.
    """

    def __init__(
        self,
        model: Any,
        *,
        encoder: Encoder,
        name: str,
        checkpoint_hash: str | None = None,
        adapter_hash: str | None = None,
        translators: Translators | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.checkpoint_hash = checkpoint_hash
        self.adapter_hash = adapter_hash
        self.translators = translators
        self.adapter: Path | None = None  # its folder, where it came from one
        self.trained_on: frozenset[str] = frozenset()  # digests of the samples and pictures recorded by a repair
        self.exits = ExitStack()
        self.encoder = encoder
        self.num_layers, self.default_exit = encoder.num_layers, encoder.default_exit
        # Taken now: inside an exit the list may be shorter, and the config is changed.
        self.encoder_blocks = tuple(block_list(self.base_model, encoder.path))
        self._feature_layer = getattr(self.base_model.config, "vision_feature_layer", None)

    @property
    def base_model(self) -> MultimodalModel:
        return bare_model(self.model)

    @property
    def family(self) -> str:
        """The model type, e.g. "qwen2_5_vl"."""
        return str(self.base_model.config.model_type)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Every exit: 1 to `num_layers`."""
        return tuple(range(1, self.num_layers + 1))

    def __repr__(self) -> str:
        """The model, its exits, and where it runs."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        added = [name for name in ("adapter_hash", "translators") if getattr(self, name) is not None]
        with_them = "".join(f", with {name.removesuffix('_hash')}" for name in added)
        return (
            f"VLM {self.name} ({self.family}, {size / 1e6:,.1f}M parameters{with_them})\n"
            f"  exits 1 to {self.num_layers}, default {self.default_exit}\n"
            f"  {str(self.base_model.dtype).removeprefix('torch.')} on {self.device}"
        )

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, those that stay on disk left out."""
        return torch.device(next((each.device for each in self.model.parameters() if not each.is_meta), "meta"))

    @contextmanager
    def exit_at(self, exit_layer: int, *, skip_global: bool = False) -> Iterator[Self]:
        """Run any Hugging Face code on `model` with `exit_layer` encoder blocks; the others do not compute.

        May be nested: the innermost exit applies. Afterwards, also after an exception, the model is as it was. Not
        thread-safe: use a model from one thread at a time.

        Args:
            exit_layer: Encoder blocks to run, 1 to `num_layers`.
            skip_global: Llama 3.2 Vision only: skip the global blocks as well.

        Raises:
            ExitLayerError: If the encoder has no such block.
            InputError: If `skip_global` is given for a model without global blocks, or the model has translators but
                none for this exit.
        """
        check_exit_layer(exit_layer, self.num_layers)
        if skip_global and not self.global_blocks:
            raise InputError(f"skip_global: {self.family} has no global blocks; leave it out")
        patch = skip_patch(
            self.base_model,
            self.encoder,
            self.encoder_blocks,
            self.exit_settings(exit_layer),
            exit_layer=exit_layer,
            skip_global=skip_global,
            hooks=self.translation_hooks(exit_layer),
        )
        with self.exits.enter(patch):
            yield self

    def exit_settings(self, exit_layer: int) -> list[ConfigEntry]:
        """The config entries with which the model reads the features of `exit_layer`: none up to the default exit,
        where skipped blocks pass on the exit's; past it, a single `vision_feature_layer` moves to the exit."""
        if exit_layer <= self.default_exit or not isinstance(self._feature_layer, int):
            return []
        return [(self.base_model.config, "vision_feature_layer", exit_layer)]

    def translation_hooks(self, exit_layer: int) -> list[Hook]:
        """The hook that translates the features of `exit_layer`; none where there is nothing to translate."""
        if self.translators is None or self.reads_default(exit_layer):
            return []
        return [(self.projector, self.translators.hook(exit_layer))]

    def reads_default(self, exit_layer: int) -> bool:
        """Whether the model reads the same features at `exit_layer` as at the default exit: at the default exit itself
        and, unless `vision_feature_layer` is a single layer, at deeper ones."""
        return exit_layer >= self.default_exit and not self.exit_settings(exit_layer)

    @property
    def global_blocks(self) -> list[torch.nn.Module]:
        """Llama 3.2 Vision's blocks that run after the encoder; none in other models."""
        return global_blocks(self.base_model)

    @property
    def tower(self) -> torch.nn.Module:
        """The largest module around the encoder's blocks without the language model."""
        decoder, parts = self.base_model.get_decoder(), self.encoder.path.split(".")
        around = (self.base_model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
        return next(module for module in around if decoder not in set(module.modules()))

    @property
    def image_cache_layers(self) -> frozenset[int]:
        """Layers of the language model's cache that hold image states, of one width, instead of text states."""
        return frozenset(getattr(self.text_config, "cross_attention_layers", None) or ())

    def num_image_states(self, media: Mapping[str, Tensor]) -> int:
        """The number of states that one prompt's images take in each of these layers."""
        if not self.image_cache_layers or not media:
            return 0
        _, num_images, num_tiles, _, height, width = media["pixel_values"].shape
        patch = self.base_model.config.vision_config.patch_size
        return int(num_images * num_tiles * ((height // patch) * (width // patch) + 1))  # each with a class token

    @property
    def projector(self) -> torch.nn.Module:
        """The module that maps image features into the language model, token by token.

        Raises:
            ModelError: If the language model reads states of several blocks, or no single module is the projector.
        """
        return find_projector(self.base_model, self.encoder)

    @property
    def text_config(self) -> PretrainedConfig:
        return self.base_model.config.get_text_config(decoder=True)

    @property
    def context_length(self) -> int:
        """The language model's context in tokens: prompt, images and answer together."""
        return int(getattr(self.text_config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def linear_layers(self) -> list[str]:
        """The names of the language model's linear layers, for PEFT's `target_modules`; never the encoder's or the
        head, which some decoders contain."""
        names = {module: name for name, module in self.base_model.named_modules()}
        inside = {module for block in self.encoder_blocks for module in block.modules()}
        inside.add(self.base_model.get_output_embeddings())
        return [
            names[module]
            for module in self.base_model.get_decoder().modules()
            if isinstance(module, torch.nn.Linear) and module not in inside and ".lora_" not in names[module]
        ]


def bare_model(model: Any) -> MultimodalModel:
    """The Hugging Face model without the PEFT wrapper (its layers stay adapted)."""
    return cast("MultimodalModel", model.get_base_model() if isinstance(model, PeftModel) else model)
