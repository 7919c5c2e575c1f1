"""`ExitingModel`: a vision-language model that can exit its image encoder early.

A thin wrapper around the Hugging Face model, which stays untouched: outside `exit_at` it behaves as loaded. Prompts and
answers are handled by `exitsafe.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from peft import PeftModel

from exitsafe.errors import InputError
from exitsafe.exits.adapters import LINEAR_LAYERS
from exitsafe.exits.cut import ConfigEntry, ExitStack, Hook, skip_patch
from exitsafe.exits.families import find_family
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exits.translators import Translators, find_projector

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.exits.huggingface import ImageTextModel


class ExitingModel:
    """A model whose image features can be read after any encoder block.

    Args:
        model: A Hugging Face model of a supported family, or a PEFT model around one.
        name: What the model was loaded from.
        checkpoint_hash: Identifies the weights, config and processor files.
        adapter_hash: Identifies the PEFT adapter, if there is one.
        translators: Optional linear maps, one per exit, applied to the features before the projector.

    Raises:
        ModelError: If the family is not supported.
    """

    def __init__(
        self,
        model: Any,
        *,
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
        self.family_row = find_family(self.base_model.config)
        self.num_layers = len(self.family_row.encoder_blocks(self.base_model))
        config = self.base_model.config
        self.default_exit = self.family_row.default_exit(config, self.num_layers)
        # Computed now: inside an exit the config is changed.
        self._exit_settings = {
            exit_layer: self.family_row.exit_settings(config, self.num_layers, exit_layer)
            for exit_layer in self.exit_layers
        }

    @property
    def base_model(self) -> ImageTextModel:
        model: Any = self.model
        return cast("ImageTextModel", model.get_base_model() if isinstance(model, PeftModel) else model)

    @property
    def family(self) -> str:
        return self.family_row.name

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
        return torch.device(self.base_model.device)

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
            InputError: If `skip_global` is given for a family without global blocks, or the model has translators but
                none for this exit.
        """
        check_exit_layer(exit_layer, self.num_layers)
        global_blocks = self.family_row.global_blocks(self.base_model)
        if skip_global and not global_blocks:
            raise InputError(f"skip_global: {self.family} has no global blocks; leave it out")
        patch = skip_patch(
            self.family_row.encoder_blocks(self.base_model),
            global_blocks,
            self.exit_settings(exit_layer),
            exit_layer=exit_layer,
            skip_global=skip_global,
            hooks=self.translation_hooks(exit_layer),
        )
        with self.exits.enter(patch):
            yield self

    def exit_settings(self, exit_layer: int) -> list[ConfigEntry]:
        """The config entries with which the model reads the features of `exit_layer`."""
        config = self.base_model.config
        return [(config, name, value) for name, value in self._exit_settings[exit_layer].items()]

    def translation_hooks(self, exit_layer: int) -> list[Hook]:
        """The hook that translates the features of `exit_layer`; none where there is nothing to translate."""
        if self.translators is None or self.reads_default(exit_layer):
            return []
        return [(self.projector, self.translators.hook(exit_layer))]

    def reads_default(self, exit_layer: int) -> bool:
        """Whether the model reads the same features at `exit_layer` as at the default exit: at the default exit itself
        and, if `vision_feature_layer` is a list, at deeper ones."""
        return self._exit_settings[exit_layer] == self._exit_settings[self.default_exit]

    @property
    def projector(self) -> torch.nn.Module:
        """The module that maps image features into the language model, token by token.

        Raises:
            ModelError: If the family's projector does not read the features of an exit as they are.
        """
        return find_projector(self.base_model, self.family_row)

    @property
    def text_config(self) -> PretrainedConfig:
        return self.base_model.config.get_text_config(decoder=True)

    @property
    def context_length(self) -> int:
        """The language model's context in tokens: prompt, images and answer together."""
        return int(self.text_config.max_position_embeddings)

    language_model_pattern = LINEAR_LAYERS
    """Regular expression for PEFT's `target_modules`: the language model's linear layers, never the encoder's."""
