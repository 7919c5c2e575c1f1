"""Exit translators: one linear map per exit that carries its features to where those of the default exit lie.

The language model was trained on the default exit's features; those of other exits are out of its distribution. Inside
an exit, what the projector is about to receive first passes the map of that exit. The default exit has none: there the
model is untouched. Knows nothing about how the maps are fitted (see
`exitsafe.baselines.translators`) or kept (see `translator_files.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exitsafe.errors import InputError, ModelError

if TYPE_CHECKING:
    from exitsafe.exits.families import Family


@dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
    """features -> features @ weight.T + bias, as a linear layer: weight (width, width), bias (width,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Translate features (..., width). In float32: the map costs little beside the encoder, its rounding might."""
        translated = nn.functional.linear(features.float(), self.weight, self.bias)
        return translated.to(features.dtype)

    def to(self, device: torch.device) -> Translator:
        return Translator(weight=self.weight.to(device), bias=self.bias.to(device))


class Translators:
    """The maps of one model, by exit layer.

    Args:
        maps: By exit layer. The default exit has none.
        source: Where they are from, for messages.
    """

    def __init__(self, maps: Mapping[int, Translator], *, source: str) -> None:
        self.maps = dict(maps)
        self.source = source
        self.hash = _hash(self.maps)

    def hook(self, exit_layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """A forward pre-hook for the projector.

        Raises:
            InputError: If there is no map for this exit: unmapped features beside mapped ones would pass for repaired.
        """
        if exit_layer not in self.maps:
            there = ", ".join(map(str, sorted(self.maps))) or "none"
            raise InputError(
                f"{self.source} has no translator for exit layer {exit_layer} (there: {there}): leave the exit out, or "
                "fit it with exitsafe translate --layers"
            )

        def translate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            features: Tensor = args[0]
            if self.maps[exit_layer].weight.device != features.device:  # kept there: a few megabytes
                self.maps[exit_layer] = self.maps[exit_layer].to(features.device)
            return (self.maps[exit_layer](features), *args[1:])

        return translate


def find_projector(model: nn.Module, family: Family) -> nn.Module:
    """`VLM.projector`."""
    if family.projector is None:
        raise ModelError(
            f"{family.name} cannot be translated: behind an exit its features pass global blocks, and the "
            "projector reads states of several blocks side by side; repair its exits by exitsafe align"
        )
    return model.get_submodule(family.projector)


def merge_translator(linear: nn.Linear, translator: Translator) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that does both: linear(translator(x)), exact up to rounding.

    For projectors that begin with a linear layer (LLaVA, LLaVA-NeXT): a model with these in its place of `linear_1`
    needs no translator at this exit.

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
    """The maps under their names in the file."""
    return {
        f"exit.{layer}.{name}": tensor.contiguous()
        for layer, translator in maps.items()
        for name, tensor in (("weight", translator.weight), ("bias", translator.bias))
    }


def _hash(maps: Mapping[int, Translator]) -> str:
    """SHA-256 over names and numbers: what decides an answer, and nothing of how they were fitted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(maps).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
