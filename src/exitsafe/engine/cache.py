"""A key-value cache that grows in blocks; transformers' own cache is copied whole for every token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for this language model; only its layers that keep every token grow in blocks."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def grows(cache: DynamicCache) -> bool:
    """Whether all layers grow by a token at a time, and keep every token."""
    return all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` whose keys and values, (B, H, S, D), are the beginning of larger tensors with room for more."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of further tokens; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, key_room = self._appended(self.keys, key_states, 0)
        self.values, value_room = self._appended(self.values, value_states, 1)
        self._rooms = key_room, value_room
        return self.keys, self.values

    def _appended(self, old: Tensor | None, new: Tensor, part: int) -> tuple[Tensor, Tensor]:
        num_old = old.shape[-2] if old is not None and old.numel() else 0
        length = num_old + new.shape[-2]
        room = None if self._rooms is None else self._rooms[part]
        # rows that leave or join replace the tensor that was given out
        if room is None or old is None or not num_old or room.shape[-2] < length or room.data_ptr() != old.data_ptr():
            size = (*new.shape[:2], -(-length // BLOCK) * BLOCK, new.shape[-1])
            room = torch.empty(size, dtype=new.dtype, device=new.device)
            if old is not None and num_old:
                room[:, :, :num_old] = old
        room[:, :, num_old:length] = new
        return room[:, :, :length], room
