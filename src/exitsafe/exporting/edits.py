"""A model's config and an exit in, the config of the stock model that ends there out: found by search, not in a table.

An encoder's depth has no common name, so every plausible edit is made and the first one taken with which the stock
class has exactly the weights that the exit keeps. `export` then proves it by logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from exitsafe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.huggingface import MultimodalModel

_DEPTH = re.compile(r"layer|depth|block")
_INDICES = re.compile(r"index|indices|layers")
Shapes = dict[str, tuple[int, ...]]


def slim_config(vlm: VLM, kept: Shapes, *, exit_layer: int, skip_global: bool) -> PretrainedConfig:
    """The config with which the stock class is the model at an exit.

    Args:
        vlm: The whole model.
        kept: Names and shapes of the weights that the exit needs; where exits are slices, some of their mergers may go.
        exit_layer: Encoder blocks to keep.
        skip_global: Whether the global blocks go too.

    Raises:
        ModelError: If no edit gives a model with these weights.
    """
    whole, path = vlm.base_model.config, _encoder_config(vlm)
    depths = [name for name, value in _entries(_at(whole, path)) if value == vlm.num_layers and _DEPTH.search(name)]
    for names in dict.fromkeys([tuple(depths), *((name,) for name in depths)]):  # all at once, then each alone
        config, found = copy.deepcopy(whole), Shapes()
        with suppress(Exception):  # an edit that contradicts itself may raise anything
            _shorten(_at(config, path), names, num_layers=vlm.num_layers, exit_layer=exit_layer)
            _clamp_taps(config, num_layers=vlm.num_layers, exit_layer=exit_layer)
            if vlm.global_blocks and skip_global:
                _at(config, path).num_global_layers = 0
            found = shapes_of(vlm.base_model, config)
        missing = kept.keys() - found.keys()
        if vlm.encoder.is_sliced:  # the mergers of dropped blocks go with them
            beside = vlm.encoder.path.rpartition(".")[0]
            missing = {name for name in missing if not (name.startswith(beside) and "merger" in name)}
        if found and not missing and all(kept.get(name) == shape for name, shape in found.items()):
            return config
    raise ModelError(
        f"{vlm.name} cannot be exported at exit {exit_layer}: no edit of its config gives a stock {vlm.family} model "
        "with the weights of this exit"
    )


def shapes_of(model: MultimodalModel, config: PretrainedConfig) -> Shapes:
    """Names and shapes of the weights of this class with another config."""
    with torch.device("meta"):
        slim = type(model)(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in slim.state_dict().items()}


def _shorten(config: Any, depths: Collection[str], *, num_layers: int, exit_layer: int) -> None:
    """Edit the encoder's config: its depth, lists with an entry for each block, and lists of blocks."""
    for name, value in _entries(config):
        if name in depths:
            setattr(config, name, exit_layer)
        elif isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(config, name, list(value)[:exit_layer])
        elif name == "intermediate_layers_indices":  # Llama 3.2 Vision: states of dropped blocks equal the exit's own
            setattr(config, name, [min(index, exit_layer - 1) for index in value])
        elif _INDICES.search(name) and isinstance(value, list | tuple) and all(type(each) is int for each in value):
            setattr(config, name, [index for index in value if index < exit_layer])


def _clamp_taps(config: Any, *, num_layers: int, exit_layer: int) -> None:
    """Let connectors read what they read at the exit: a single layer is the last, of several none is past it.

    Layers are counted from the first block, as other engines expect, except for -1: what a model reads there may
    include the encoder's last norm (InternVL).
    """

    def clamped(layer: int) -> int:
        return min(layer if layer >= 0 else num_layers + 1 + layer, exit_layer)

    taps = getattr(config, "vision_feature_layer", None)
    if isinstance(taps, int):
        config.vision_feature_layer = -1 if taps == -1 else exit_layer
    elif taps is not None:
        config.vision_feature_layer = [clamped(layer) for layer in taps]
    if isinstance(pairs := getattr(config, "deepstack_layer_map", None), list | tuple):  # Granite 4 Vision
        config.deepstack_layer_map = [[clamped(layer), of_decoder] for layer, of_decoder in pairs]
    if isinstance(layer := getattr(config, "spatial_vision_layer", None), int):
        config.spatial_vision_layer = clamped(layer)
    for path, inner in _sub_configs(config, ()):
        if path and isinstance(taps := getattr(inner, "vision_feature_layer", None), list | tuple):
            # Molmo 2: 0 is the first block; from the end, as elsewhere, -1 is the last
            inner.vision_feature_layer = [
                clamped(layer) - exit_layer - 1 if layer < 0 else min(layer, exit_layer - 1) for layer in taps
            ]


def _encoder_config(vlm: VLM) -> tuple[str, ...]:
    """Where the encoder's own config is in the model's: the names on the way to the innermost one around the blocks."""
    places = {id(config): path for path, config in _sub_configs(vlm.base_model.config, ())}
    parts = vlm.encoder.path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        config = getattr(vlm.base_model.get_submodule(".".join(parts[:end])), "config", None)
        if path := places.get(id(config)):
            return path
    raise ModelError(f"{vlm.name} cannot be exported: its config has no part for the encoder {vlm.encoder.path}")


def _sub_configs(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            yield from _sub_configs(inner, (*path, name))


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _entries(config: Any) -> list[tuple[str, Any]]:
    values: Mapping[str, Any] = vars(config)
    return [(name, value) for name, value in values.items() if not name.startswith("_")]
