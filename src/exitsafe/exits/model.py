"""`ExitingModel`: a vision-language model that can exit its image encoder early.

A thin shell around the Hugging Face model, which stays untouched: outside `exit_at` it behaves as loaded. Prompts and
answers are the business of `exitsafe.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel

from exitsafe.errors import InputError
from exitsafe.exits.adapters import LINEAR_LAYERS
from exitsafe.exits.cut import ExitStack, Hook, skip_patch
from exitsafe.exits.families import find_family
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exits.translators import Translators, find_projector


class ExitingModel:
    """A model whose image features can be read after any encoder block.

    Args:
        model: A Hugging Face model of a supported family, or a PEFT model around one.
        name: What the model was loaded from.
        checkpoint_hash: Identifies the weights, config and processor files.
        adapter_hash: Identifies the PEFT adapter, if there is one.
        translators: One linear map per exit that features pass before the projector, if wanted.

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
        self.trained_on: frozenset[str] = frozenset()  # digests of samples and pictures, where a repair names them
        self.exits = ExitStack()
        self.family_row = find_family(self.base_model.config)
        self.num_layers = len(self.family_row.encoder_blocks(self.base_model))
        config = self.base_model.config
        self.default_exit = self.family_row.default_exit(config, self.num_layers)
        # Taken now: inside an exit the config says something else.
        self._exit_settings = {
            exit_layer: self.family_row.exit_settings(config, self.num_layers, exit_layer)
            for exit_layer in self.exit_layers
        }

    @property
    def base_model(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def family(self) -> str:
        return self.family_row.name

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Every exit: 1 to `num_layers`."""
        return tuple(range(1, self.num_layers + 1))

    def __repr__(self) -> str:
        """What it is, where it exits and where it runs."""
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

        Nestable: the innermost exit acts. On leaving, also by an exception, the model is as it was. Not for two threads
        at once on one model.

        Args:
            exit_layer: Encoder blocks to run, 1 to `num_layers`.
            skip_global: Llama 3.2 Vision only: skip the global blocks as well.

        Raises:
            ExitLayerError: If the encoder has no such block.
            InputError: If `skip_global` is asked of a family without global blocks, or the translators, if there are
                any, have no map for this exit.
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

    def exit_settings(self, exit_layer: int) -> list[tuple[Any, str, Any]]:
        """(config, entry, value) triples under which the model reads the features of `exit_layer`."""
        config = self.base_model.config
        return [(config, name, value) for name, value in self._exit_settings[exit_layer].items()]

    def translation_hooks(self, exit_layer: int) -> list[Hook]:
        """What carries features of `exit_layer` through its translator; nothing where there is nothing to translate."""
        if self.translators is None or self.reads_default(exit_layer):
            return []
        return [(self.projector, self.translators.hook(exit_layer))]

    def reads_default(self, exit_layer: int) -> bool:
        """Whether the model reads the very same features at `exit_layer` as at the default exit: there, and, where
        `vision_feature_layer` is a list, at deeper exits."""
        return self._exit_settings[exit_layer] == self._exit_settings[self.default_exit]

    @property
    def projector(self) -> torch.nn.Module:
        """What maps image features into the language model, token by token.

        Raises:
            ModelError: If the family's projector does not read the features of an exit as they are.
        """
        return find_projector(self.base_model, self.family_row)

    @property
    def text_config(self) -> Any:
        return self.base_model.config.get_text_config(decoder=True)

    @property
    def context_length(self) -> int:
        """Tokens that the language model was made for: prompt, images and answer together."""
        return int(self.text_config.max_position_embeddings)

    language_model_pattern = LINEAR_LAYERS
    """Regular expression for PEFT's `target_modules`: the language model's linear layers, never the encoder's."""
