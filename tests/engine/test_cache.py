"""The cache that grows in blocks holds what transformers' own holds."""

from __future__ import annotations

from typing import cast

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from exitsafe.engine.cache import BLOCK, GrowingLayer, growing_cache, grows


def states(tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)


def test_it_holds_what_the_own_cache_holds_whoever_leaves_or_joins() -> None:
    torch.manual_seed(0)
    own, growing = DynamicLayer(), GrowingLayer()
    rows = 3
    for step in range(2 * BLOCK + 3):
        keys, values = states(5 if step == 0 else 1, rows)
        wanted, found = own.update(keys, values), growing.update(keys, values)
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
        assert own.get_seq_length() == growing.get_seq_length()
        if step in (3, 70):  # a row leaves, and columns that none of the others uses
            kept = cast(torch.LongTensor, torch.arange(rows - 1))
            for layer in (own, growing):
                layer.reorder_cache(kept)
                assert layer.keys is not None and layer.values is not None
                layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
            rows -= 1
        if step == 90:  # one joins
            for layer in (own, growing):
                assert layer.keys is not None and layer.values is not None
                layer.keys, layer.values = (torch.cat([each, each[:1]]) for each in (layer.keys, layer.values))
            rows += 1


def test_a_token_is_written_in_place_until_a_block_is_full() -> None:
    layer = GrowingLayer()
    keys, _ = layer.update(*states(BLOCK - 2))
    places = [layer.update(*states(1))[0].data_ptr() for _ in range(3)]
    assert places[:2] == [keys.data_ptr()] * 2
    assert places[2] != keys.data_ptr()


def test_only_layers_that_keep_every_token_grow() -> None:
    plain = LlamaConfig(num_hidden_layers=2)
    assert [type(layer) for layer in growing_cache(plain).layers] == [GrowingLayer, GrowingLayer]
    assert grows(growing_cache(plain)) and grows(DynamicCache(config=plain))
    sliding = LlamaConfig(num_hidden_layers=2)
    sliding.sliding_window, sliding.layer_types = 8, ["full_attention", "sliding_attention"]
    kinds = [type(layer).__name__ for layer in growing_cache(sliding).layers]
    assert kinds == ["GrowingLayer", "DynamicSlidingWindowLayer"]
    assert not grows(growing_cache(sliding))
