"""Exit translators: one linear map per exit that carries its features to where those of the default exit lie.

The language model was trained on the default exit's features; those of other exits are out of its distribution. Inside
an exit, what the projector is about to receive first passes the map of that exit. The default exit has none: there the
model is untouched. Knows nothing about how the maps are fitted (see `exitsafe.baselines.translators`).

    translators.safetensors   exit.L.weight (width, width) and exit.L.bias (width,), float32
    translators.json          the model they belong to, and how they were fitted; written last
    trained_on.json           digests of the pictures they were fitted to
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from exitsafe.errors import InputError, ModelError
from exitsafe.untrusted import UnreadableError, read_json

if TYPE_CHECKING:
    from exitsafe.vlm.families import Family
    from exitsafe.vlm.model import VLM

MAPS, RECORD = "translators.safetensors", "translators.json"


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


def load_translators(vlm: VLM, folder: str | Path) -> Translators:
    """Read the maps that were fitted for this model.

    Raises:
        ModelError: If the folder holds none, or another model's, or the family cannot be translated.
    """
    _ = vlm.projector  # refuses families that cannot be translated
    record = read_record(Path(folder))
    if record is None:
        raise ModelError(f"{folder} has no {RECORD}: give a folder that exitsafe translate has finished")
    made_for, now = record["model"], model_record(vlm)
    changed = [name for name in now if name != "name" and made_for.get(name) != now[name]]
    if changed:
        raise ModelError(
            f"translators {folder} were made for {made_for.get('name')}, which differs from {vlm.name} in "
            f"{', '.join(changed)}: make them again with exitsafe translate"
        )
    try:
        tensors = safetensors.torch.load_file(Path(folder) / MAPS)
        maps = {
            layer: Translator(weight=tensors.pop(f"exit.{layer}.weight"), bias=tensors.pop(f"exit.{layer}.bias"))
            for layer in (int(entry["exit_layer"]) for entry in record["exits"])
        }
        if beyond := [layer for layer in maps if not 1 <= layer <= vlm.num_layers]:
            raise ValueError(f"there is no exit {beyond[0]}")
    except (OSError, OverflowError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/{MAPS} is damaged or missing: make them again with exitsafe translate") from error
    if tensors:
        names = ", ".join(sorted(tensors)[:3])
        raise ModelError(
            f"{folder}/{MAPS} holds {len(tensors)} tensors that {RECORD} does not name ({names}): fit them again"
        )
    for layer, translator in maps.items():
        width = translator.bias.numel()
        shapes = tuple(translator.weight.shape), tuple(translator.bias.shape)
        if shapes != ((width, width), (width,)) or not _is_finite(translator):
            raise ModelError(
                f"{folder}/{MAPS}: the map of exit {layer} is not a square matrix of finite numbers; fit them again "
                "with exitsafe translate --dtype float32"
            )
    translators = Translators(maps, source=str(folder))
    if translators.hash != record["hash"]:
        raise ModelError(f"{folder}/{MAPS} is not the file that {RECORD} describes: make them again")
    return translators


def read_record(folder: Path) -> dict[str, Any] | None:
    """`translators.json`, or None if there is none.

    Raises:
        ModelError: If it is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if isinstance(record["model"], dict) and isinstance(record["exits"], list) and isinstance(record["hash"], str):
            return record
    except (UnreadableError, KeyError):
        pass
    raise ModelError(f"{path} is not a record of translators: choose another folder")


def model_record(vlm: VLM) -> dict[str, Any]:
    """What must be equal, but for the name, for translators to fit a model. An adapter does not touch the encoder."""
    return {
        "name": vlm.name,
        "family": vlm.family,
        "num_layers": vlm.num_layers,
        "default_exit": vlm.default_exit,
        "checkpoint": vlm.checkpoint_hash,
    }


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


def _is_finite(translator: Translator) -> bool:
    return bool(translator.weight.isfinite().all() and translator.bias.isfinite().all())


def _hash(maps: Mapping[int, Translator]) -> str:
    """SHA-256 over names and numbers: what decides an answer, and nothing of how they were fitted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(maps).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
