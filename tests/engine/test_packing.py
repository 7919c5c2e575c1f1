"""Packed responses: what the model says of each is what it says of it alone, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from exitsafe.engine.packing import collate_packed, sibling_groups, tree_mask
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample

GROUP_SIZES = (3, 2, 1)  # one group whole, two with answers missing
RESPONSES = [torch.tensor(ids) for ids in ([12, 13, 2], [14], [20, 11, 12, 13, 15], [9, 2], [9, 10, 11, 12], [11])]


def packable_rows(vlm: VLM, samples: Sequence[Sample]) -> list[Row]:
    """Three prompts of different lengths with one image each, at three exits; neighbours ask the same."""
    chosen, exits = [samples[0], samples[1], samples[4]], [1, 5, 3]
    prompts = [vlm.encode_prompt(sample) for sample in chosen]
    features = vlm.prompt_features(prompts, exits)
    rows = [
        Row(prompt=prompt, exit_layer=layer, features=found[layer])
        for prompt, layer, found in zip(prompts, exits, features, strict=True)
    ]
    return [row for row, size in zip(rows, GROUP_SIZES, strict=True) for _ in range(size)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_states_and_gradients_equal_those_of_separate_sequences(
    vlm: VLM, samples: list[Sample], attention: str
) -> None:
    vlm.model.set_attn_implementation(attention)
    assert vlm.can_pack
    rows = packable_rows(vlm, samples)
    weights = [weight for name, weight in vlm.model.named_parameters() if "language_model" in name]
    apart = [vlm.response_states([row], [response]) for row, response in zip(rows, RESPONSES, strict=True)]
    hidden, tokens, mask = vlm.packed_response_states(rows, RESPONSES, group_size=3)
    assert hidden.shape == (6, 5, vlm.text_config.hidden_size)  # kept at response positions only
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    wanted_loss, loss = torch.zeros(()), (hidden * direction)[mask].sum()
    for place, response in enumerate(RESPONSES):
        length = len(response)
        assert mask[place].tolist() == [True] * length + [False] * (5 - length)
        assert tokens[place, :length].tolist() == response.tolist()
        assert torch.allclose(hidden[place, :length], apart[place][0][0], atol=1e-5)
        wanted_loss = wanted_loss + (apart[place][0][0] * direction[place, :length]).sum()
    wanted = torch.autograd.grad(wanted_loss, weights, allow_unused=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    assert sum(gradient is not None for gradient in wanted) > 10
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()) + 1e-6)


def test_siblings_do_not_see_each_other(vlm: VLM, samples: list[Sample]) -> None:
    rows = packable_rows(vlm, samples)
    changed = [*RESPONSES]
    changed[0] = torch.tensor([25, 26, 27])
    with torch.no_grad():
        before, _, mask = vlm.packed_response_states(rows, RESPONSES, group_size=3)
        after, _, _ = vlm.packed_response_states(rows, changed, group_size=3)
    assert torch.equal(before[1:][mask[1:]], after[1:][mask[1:]])
    assert torch.equal(before[0, 0], after[0, 0])  # the prompt's last token, which predicts the first
    assert not torch.allclose(before[0, 1:3], after[0, 1:3], atol=1e-3)


def test_the_prompt_is_computed_once_per_group(vlm: VLM, samples: list[Sample]) -> None:
    rows = packable_rows(vlm, samples)
    shapes: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(args[0].shape))

    first_block = vlm.base_model.model.language_model.layers[0]
    handle = first_block.register_forward_pre_hook(note)
    vlm.packed_response_states(rows, RESPONSES, group_size=3)
    vlm.packed_response_states(rows, RESPONSES, group_size=2)
    handle.remove()
    longest = max(len(row.prompt.input_ids) for row in rows)
    assert [shape[:2] for shape in shapes] == [(3, longest + 3 + 1 + 5), (4, longest + 2 + 4)]


def test_neighbours_that_ask_the_same_are_grouped_up_to_the_size(vlm: VLM, samples: list[Sample]) -> None:
    rows = packable_rows(vlm, samples)
    assert sibling_groups(rows, 3) == [[0, 1, 2], [3, 4], [5]]
    assert sibling_groups(rows, 2) == [[0, 1], [2], [3, 4], [5]]
    assert sibling_groups(rows, 1) == [[0], [1], [2], [3], [4], [5]]
    assert sibling_groups([rows[0], rows[3], rows[1]], 3) == [[0], [1], [2]]
    other_features = replace(rows[1], features={**(rows[1].features or {})})
    assert sibling_groups([rows[0], other_features], 3) == [[0], [1]]
    other_exit = replace(rows[1], exit_layer=5)
    assert sibling_groups([rows[0], other_exit, rows[5]], 3) == [[0], [1], [2]]
    assert sibling_groups([rows[0], replace(rows[1], draw=1)], 3) == [[0, 1]]


def test_branches_positions_and_reads_by_hand(vlm: VLM, samples: list[Sample]) -> None:
    rows = packable_rows(vlm, samples)[2:5]  # groups [row 2] and [rows 3, 4]
    lengths = [len(rows[0].prompt.input_ids), len(rows[1].prompt.input_ids)]
    longest = max(lengths)
    batch, branch, reads = collate_packed(rows, RESPONSES[1:4], [[0], [1, 2]], pad_token_id=0)
    assert branch.shape == batch["input_ids"].shape == (2, longest + 7)
    left = [longest - length for length in lengths]
    assert branch[0].tolist() == [-1] * left[0] + [0] * lengths[0] + [1] + [-1] * 6
    assert branch[1].tolist() == [-1] * left[1] + [0] * lengths[1] + [1] * 5 + [2] * 2
    tail = batch["position_ids"][1, longest:].tolist()
    assert tail == [lengths[1] + step for step in (0, 1, 2, 3, 4, 0, 1)]
    row = longest + 7
    assert reads.tolist() == [
        [longest - 1, 0, 0, 0, 0],
        [row + longest - 1 + step for step in range(5)],
        [row + longest - 1, row + longest + 5, 0, 0, 0],
    ]


def test_the_tree_mask_by_hand() -> None:
    branch = torch.tensor([[-1, 0, 0, 1, 1, 2, -1]])
    wanted = [
        [1, 0, 0, 0, 0, 0, 0],  # padding sees itself: no row is empty
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],  # the second sibling: the prompt and itself
        [1, 1, 1, 0, 0, 0, 1],
    ]
    mask = tree_mask(branch)
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].int().tolist() == wanted
    added = tree_mask(branch, additive=torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert ((added == 0) == mask).all()
    assert (added[~mask] == torch.finfo(torch.bfloat16).min).all()


@pytest.mark.parametrize(("name", "value"), [("_attn_implementation", "flash_attention_2"), ("sliding_window", 4096)])
def test_attention_that_takes_no_tree_mask_is_not_packed(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(vlm.text_config, name, value, raising=False)
    assert not VLM(vlm.model, vlm.processor, encoder=vlm.encoder, name="again").can_pack


def test_siblings_are_read_once_and_answered_as_if_alone(vlm: VLM, samples: list[Sample]) -> None:
    rows = packable_rows(vlm, samples)
    numbered = [replace(row, draw=draw) for row, draw in zip(rows, (0, 1, 2, 0, 1, 0), strict=True)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    prefills: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] > 1:
            prefills.append(args[0].shape[0])

    handle = vlm.base_model.model.language_model.layers[0].register_forward_pre_hook(note)
    together = dict(vlm.complete(numbered, batch_size=6, **settings))
    in_parts = dict(vlm.complete(numbered, batch_size=4, **settings))
    handle.remove()
    assert prefills[0] == 3
    for place, (row, numbered_row) in enumerate(zip(rows, numbered, strict=True)):
        [(_, alone)] = vlm.complete([row], batch_size=1, draw=numbered_row.draw, **settings)
        assert together[place].token_ids == in_parts[place].token_ids == alone.token_ids
    assert len({together[place].token_ids for place in range(3)}) > 1
