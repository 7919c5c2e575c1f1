"""Exit translators: one linear map per exit, from its features to those of the default exit.

The language model was trained on the default exit's features; those of other exits are out of its distribution. Inside
an exit, the projector's input first passes through the map of that exit. The default exit has none: there the model is
untouched. `exitsafe.baselines.translators` fits the maps, `translator_files.py` loads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exitsafe.errors import InputError, ModelError

if TYPE_CHECKING:
    from exitsafe.exits.encoder import Encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
    """features -> features @ weight.T + bias, as a linear layer: weight (width, width), bias (width,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Translate features (..., width), in float32: cheap next to the encoder, and free of rounding errors."""
        translated = nn.functional.linear(features.float(), self.weight, self.bias)
        return translated.to(features.dtype)

    def to(self, device: torch.device) -> Translator:
        return Translator(weight=self.weight.to(device), bias=self.bias.to(device))


class Translators:
    """The maps of one model, by exit layer.

    Args:
        maps: By exit layer. The default exit has none.
        source: Where they come from, for messages.
    """

    def __init__(self, maps: Mapping[int, Translator], *, source: str) -> None:
        self.maps = dict(maps)
        self.source = source
        self.hash = _hash(self.maps)

    def hook(self, exit_layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """A forward pre-hook for the projector.

        Raises:
            InputError: If there is no map for this exit, whose untranslated features would be taken for repaired ones.
        """
        if exit_layer not in self.maps:
            available = ", ".join(map(str, sorted(self.maps))) or "none"
            raise InputError(
                f"{self.source} has no translator for exit layer {exit_layer} (available: {available}): leave the exit "
                "out, or fit it with exitsafe translate --layers"
            )

        def translate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            features = args[0]
            if self.maps[exit_layer].weight.device != features.device:  # moved once: a few megabytes
                self.maps[exit_layer] = self.maps[exit_layer].to(features.device)
            return (self.maps[exit_layer](features), *args[1:])

        return translate


def find_projector(model: nn.Module, encoder: Encoder) -> nn.Module:
    """The module that reads an exit's features as they are; raises ModelError if there is none."""
    if encoder.projector is None:
        raise ModelError(
            "this model cannot be translated: its language model reads states of several blocks, or its projector is "
            "not a module of its own; repair its exits with exitsafe align"
        )
    return model.get_submodule(encoder.projector)


def merge_translator(linear: nn.Linear, translator: Translator) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer that computes linear(translator(x)), exact up to rounding.

    For projectors that begin with a linear layer (LLaVA, LLaVA-NeXT): with these in `linear_1`, a model needs no
    translator at this exit.

    Args:
        linear: The projector's first layer, (out, width).
        translator: The exit's map.

    Returns:
        weight (out, width) and bias (out,) in the layer's dtype.
    """
    weight, shift = linear.weight.double(), translator.bias.to(linear.weight.device).double()
    merged = weight @ translator.weight.to(weight)
    bias = weight @ shift
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    return merged.to(linear.weight.dtype), bias.to(linear.weight.dtype)


def tensors_of(maps: Mapping[int, Translator]) -> dict[str, Tensor]:
    """The maps' tensors by their names in the file."""
    return {
        f"exit.{layer}.{name}": tensor.contiguous()
        for layer, translator in maps.items()
        for name, tensor in (("weight", translator.weight), ("bias", translator.bias))
    }


def _hash(maps: Mapping[int, Translator]) -> str:
    """SHA-256 over names and values: everything that affects an answer, but not how the maps were fitted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(maps).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
