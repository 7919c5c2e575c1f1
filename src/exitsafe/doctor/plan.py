"""A model's memory needs, as far as they are known before it is loaded: weights, a row's cache, and rows that fit.

They follow from shapes and types. Activations, kernel workspaces and allocator rounding do not: audits and training
start with what seems to fit and halve it when memory runs out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from exitsafe.doctor.blueprint import Blueprint, Weights, weights_of
from exitsafe.doctor.prompts import Typical
from exitsafe.machine.memory import ImageStates, cache_bytes, rows_that_fit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on the device."""

    weights: Weights
    judge_bytes: int
    """The judge's weights, loaded beside the model."""
    free_bytes: int
    """Free memory before anything is loaded."""
    num_tokens: int
    """Length of the longest prompt with its answer."""
    cache_bytes_per_row: int
    """Key-value cache at that length."""
    rows: int
    """Batch size that an audit would start with; 0 if the weights do not fit."""

    @property
    def loaded_bytes(self) -> int:
        return self.weights.total + self.judge_bytes


def make_plan(
    blueprint: Blueprint, typical: Typical, *, max_new_tokens: int, judge_bytes: int, free_bytes: int
) -> Plan:
    """Plan an audit.

    Args:
        blueprint: The model.
        typical: Its largest prompt.
        max_new_tokens: Longest answer.
        judge_bytes: The judge's weights, loaded beside the model.
        free_bytes: Free memory on the device before anything is loaded.
    """
    weights = weights_of(blueprint)
    num_tokens = typical.num_prompt_tokens + max_new_tokens
    images = ImageStates(
        num_layers=len(blueprint.image_cache_layers),
        per_row=0 if typical.image_states is None else typical.image_states.shape[1],
    )
    text_config, dtype = blueprint.text_config, blueprint.base_model.dtype
    left = free_bytes - weights.total - judge_bytes
    rows = 0
    if left > 0:
        rows = rows_that_fit(text_config, num_tokens=num_tokens, dtype=dtype, free=left, images=images)
    return Plan(
        weights=weights,
        judge_bytes=judge_bytes,
        free_bytes=free_bytes,
        num_tokens=num_tokens,
        cache_bytes_per_row=cache_bytes(text_config, num_tokens=num_tokens, dtype=dtype, images=images),
        rows=rows,
    )


def bytes_by_name(name: str) -> int:
    """Bytes of a model in bfloat16, by the size in its name; 0 if the name has none.

    >>> bytes_by_name("Qwen/Qwen3Guard-Gen-0.6B")
    1200000000
    """
    billions = re.search(r"(\d+(?:\.\d+)?)[bB]\b", name)
    return 0 if billions is None else int(float(billions[1]) * 2e9)
