"""Errors for NaN and infinity, so that no answer, score or weight is computed from them.

Half precision overflows in projectors and language models that were trained in bfloat16, and checkpoints get damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from exitsafe.errors import ModelError

_WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


class _Prompt(Protocol):
    @property
    def sample_id(self) -> str: ...


class _Asked(Protocol):
    @property
    def exit_layer(self) -> int: ...
    @property
    def prompt(self) -> _Prompt: ...


def check_finite(numbers: Tensor, rows: Sequence[_Asked], *, what: str, dtype: torch.dtype) -> None:
    """Raise ModelError for the first row whose numbers are not all finite.

    Args:
        numbers: (B, ...), one row for each of `rows`.
        rows: The rows answered, for the message.
        what: What the numbers are, for the message.
        dtype: The model's number type.
    """
    is_finite = numbers.isfinite().reshape(len(rows), -1).all(dim=1)
    if is_finite.all():
        return
    row = rows[is_finite.tolist().index(False)]
    raise not_finite(what, exit_layer=row.exit_layer, sample_id=row.prompt.sample_id, dtype=dtype)


def not_finite(what: str, *, exit_layer: int, dtype: torch.dtype, sample_id: str | None = None) -> ModelError:
    """The error for numbers that are NaN or infinite."""
    where = f"exit {exit_layer}" if sample_id is None else f"sample {sample_id} at exit {exit_layer}"
    name = str(dtype).removeprefix("torch.")
    hint = (
        f"use another number type (--dtype {_WIDER[dtype]}) and a new folder for the run"
        if dtype in _WIDER
        else "the weights of the checkpoint or the adapter are damaged: download or train them again"
    )
    return ModelError(f"{where}: {what} are NaN or infinite in {name}, so they were not used; {hint}")
