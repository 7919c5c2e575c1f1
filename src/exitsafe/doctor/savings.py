"""What each exit saves, counted from shapes: floating-point operations of matrix products and bytes of weights.

Operations are compared with the untouched model at its default exit, bytes with the whole checkpoint: an exit's export
drops every block after the exit, including those that the default exit never reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from exitsafe.doctor.blueprint import Blueprint, weights_of
from exitsafe.doctor.prompts import Typical
from exitsafe.exits.encoder import MODALITIES, media_inputs, run_encoder
from exitsafe.results.costs import Savings

NUM_ANSWER_TOKENS = 64


def _count_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
"""An operation that torch does not count."""


@torch.no_grad()
def count_savings(
    blueprint: Blueprint,
    typical: Typical,
    exit_layers: Sequence[int],
    *,
    skip_global: bool = False,
    num_answer_tokens: int = NUM_ANSWER_TOKENS,
) -> Savings:
    """Count operations and bytes for each exit.

    Args:
        blueprint: The model.
        typical: Its prompt.
        exit_layers: The exits.
        skip_global: As in `VLM.exit_at`; global blocks neither run nor count as kept.
        num_answer_tokens: Length of the answer.
    """
    blueprint.image_states = typical.image_states
    prefill, longer = _language_model(
        blueprint, (typical.num_prompt_tokens, typical.num_prompt_tokens + num_answer_tokens)
    )
    whole = _by_exit(blueprint, typical, skip_global=False)
    encoder = _by_exit(blueprint, typical, skip_global=True) if skip_global else whole
    return Savings(
        default_encoder=whole[blueprint.default_exit],
        encoder={layer: encoder[layer] for layer in exit_layers},
        prefill=prefill,
        answer=longer - prefill,
        num_answer_tokens=num_answer_tokens,
        dropped_bytes={layer: _dropped_bytes(blueprint, layer, skip_global=skip_global) for layer in exit_layers},
        model_bytes=weights_of(blueprint).total,
        is_measured=typical.is_measured,
    )


def _by_exit(blueprint: Blueprint, typical: Typical, *, skip_global: bool) -> dict[int, int]:
    """Operations at every exit, from one pass: blocks may differ, for example in the windows that they attend to.

    What runs between two blocks (a deepstack merger) counts with the first of them.
    """
    reached: list[int] = []  # before each block, and after the last
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION))

        def note(*_: object) -> None:
            reached.append(int(counter.get_total_flops()))

        for block in blueprint.encoder_blocks:
            stack.callback(block.register_forward_pre_hook(note).remove)
        stack.callback(blueprint.encoder_blocks[-1].register_forward_hook(note).remove)
        stack.enter_context(blueprint.exit_at(blueprint.num_layers, skip_global=skip_global))
        for modality in MODALITIES:
            media = media_inputs(blueprint.base_model, typical.media, modality)
            if media:
                run_encoder(blueprint.base_model, modality, media)
    total, runs = int(counter.get_total_flops()), len(reached) // (blueprint.num_layers + 1)
    found = dict.fromkeys(blueprint.exit_layers, total)
    for run in range(runs):  # pictures and videos are encoded separately
        marks = reached[run * (blueprint.num_layers + 1) :][: blueprint.num_layers + 1]
        for layer in blueprint.exit_layers:
            found[layer] -= marks[-1] - marks[layer]
    return found


def _language_model(blueprint: Blueprint, lengths: Sequence[int]) -> list[int]:
    """Operations of the language model for these numbers of tokens."""
    found = []
    for num_tokens in lengths:
        with FlopCounterMode(display=False) as counter:
            try:
                blueprint.read_tokens(1, num_tokens)
            except Exception:  # noqa: BLE001 - masks and routers that look at values, in any way
                warnings.warn(
                    f"the operations of {blueprint.name}'s language model are estimated as two per weight and token, "
                    "since it cannot run without its weights; a mixture of experts does fewer",
                    stacklevel=2,
                )
                weights = sum(weight.numel() for weight in blueprint.base_model.get_decoder().parameters())
                return [2 * weights * length for length in lengths]
        found.append(int(counter.get_total_flops()))
    return found


def _dropped_bytes(blueprint: Blueprint, exit_layer: int, *, skip_global: bool) -> int:
    """Bytes of the blocks that an exit drops; the encoder is never quantized."""
    dropped = [*blueprint.encoder_blocks[exit_layer:], *(blueprint.global_blocks if skip_global else ())]
    return sum(tensor.nbytes for block in dropped for tensor in (*block.parameters(), *block.buffers()))
