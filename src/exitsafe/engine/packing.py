"""Several responses to one prompt as one sequence: [prompt, response 1, ..., response G].

A tree mask lets each response see the prompt and itself, never a sibling, and each response's positions continue from
the prompt's end. So the prompt, mostly image tokens, is computed once for all responses to it: P + G R tokens where
separate sequences take G (P + R). Nothing else about the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from exitsafe.engine.prompts import Row, collate
from exitsafe.engine.reader import Reader
from exitsafe.exits.features import handed_over


def packed_states(
    vlm: Reader, rows: Sequence[Row], responses: Sequence[Tensor], *, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of `VLM.packed_response_states`."""
    groups = sibling_groups(rows, group_size)
    batch, branch, reads = collate_packed(
        rows, responses, groups, pad_token_id=vlm.pad_token_id, of_next_token=vlm.of_next_token
    )
    first_rows = [rows[group[0]] for group in groups]
    takes_bool = vlm.text_config._attn_implementation == "sdpa"
    tokens = pad_sequence(list(responses), batch_first=True, padding_value=vlm.pad_token_id).to(vlm.device)
    lengths = torch.tensor([len(response) for response in responses])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(vlm.device)
    outputs = vlm.base_model.model(
        **{name: tensor.to(vlm.device) for name, tensor in batch.items()},
        attention_mask=tree_mask(branch.to(vlm.device), additive=None if takes_bool else vlm.base_model.dtype),
        **handed_over(
            vlm.base_model,
            [row.features for row in first_rows if row.features is not None],
            batch["input_ids"].to(vlm.device),
        ),
        use_cache=False,
    )
    return outputs.last_hidden_state.flatten(0, 1)[reads.to(vlm.device)], tokens, mask


def sibling_groups(rows: Sequence[Row], group_size: int) -> list[list[int]]:
    """Indices of adjacent rows with the same prompt and features, at most `group_size` in a group."""
    groups: list[list[int]] = []
    for place, row in enumerate(rows):
        if groups and len(groups[-1]) < group_size and rows[groups[-1][0]].asks_the_same(row):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def collate_packed(
    rows: Sequence[Row],
    responses: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    of_next_token: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Left-pad the groups' prompts, append their concatenated responses and right-pad them.

    Args:
        rows: One per response.
        responses: Token ids, (length,) each.
        groups: Indices of the rows that share a sequence; every index once, in order.
        pad_token_id: Fills masked positions.
        of_next_token: As in `collate`.

    Returns:
        The batch that `collate` makes of one row per group, with the siblings' positions and no `attention_mask`;
        the branch of each token, (groups, S) int64, for `tree_mask`; and where to read each response: (responses, T)
        int64 indices into the (groups * S) hidden states of the positions that predict its tokens, 0 past its end.
    """
    packed = [torch.cat([torch.as_tensor(responses[place]) for place in group]) for group in groups]
    prompts = [rows[group[0]].prompt for group in groups]
    batch = collate(prompts, packed, pad_token_id=pad_token_id, of_next_token=of_next_token)
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    num_groups, width = batch["input_ids"].shape
    prompt_end = width - max(len(tokens) for tokens in packed)
    branch = torch.full((num_groups, width), _PADDING)
    branch[:, :prompt_end][batch["attention_mask"][:, :prompt_end].bool()] = _PROMPT
    reads = torch.zeros(len(rows), max(len(response) for response in responses), dtype=torch.long)
    for number, group in enumerate(groups):
        prompt_length = len(rows[group[0]].prompt.input_ids)
        start = prompt_end
        for sibling, place in enumerate(group, start=1):
            length = len(responses[place])
            branch[number, start : start + length] = sibling
            batch["position_ids"][number, start : start + length] = prompt_length + torch.arange(length)
            # The prompt's last token predicts every sibling's first.
            reads[place, 0] = number * width + prompt_end - 1
            reads[place, 1:length] = number * width + start + torch.arange(length - 1)
            start += length
    del batch["attention_mask"]
    return batch, branch, reads


_PADDING, _PROMPT = -1, 0  # siblings count from 1


def tree_mask(branch: Tensor, *, additive: torch.dtype | None = None) -> Tensor:
    """The attention mask: a query attends to itself and earlier tokens of the prompt or of its own branch.

    Args:
        branch: (B, S) int64, from `collate_packed`.
        additive: None for a bool mask (which scaled dot-product attention accepts in any precision); otherwise the
            mask is 0 where attention is allowed and the lowest number of this type elsewhere.

    Returns:
        (B, 1, S, S). Padding attends to padding, so that no row is empty: softmax of nothing is NaN.
    """
    width = branch.shape[1]
    keys, queries = branch[:, None, None, :], branch[:, None, :, None]
    earlier = torch.ones(width, width, dtype=torch.bool, device=branch.device).tril()
    is_allowed = ((keys == _PROMPT) | (keys == queries)) & earlier
    if additive is None:
        return is_allowed
    return torch.zeros_like(is_allowed, dtype=additive).masked_fill_(~is_allowed, torch.finfo(additive).min)
