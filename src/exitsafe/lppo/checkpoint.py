"""Checkpoints of a training run: nested dicts of tensors and numbers.

A checkpoint is written to a temporary file and renamed, and begins with the SHA-256 of the rest, so a truncated one is
never mistaken for a complete one.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exitsafe.store.files import write_whole, writing

_DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(folder: Path, step: int, state: Mapping[str, object], *, keep: int = 2) -> None:
    """Write the state after `step` steps, then delete all but the newest `keep`: the newest may be truncated."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_whole(folder / f"step-{step:06d}.ckpt", hashlib.sha256(content).digest() + content)
    for old in _newest_first(folder)[keep:]:
        old.unlink()


def load_checkpoint(folder: Path, device: torch.device) -> tuple[int, dict[str, Any]] | None:
    """(steps done, state) of the newest intact checkpoint; None if there is none.

    Warns of every damaged one that is skipped.
    """
    for path in _newest_first(folder):
        try:
            step, stored = int(path.stem.removeprefix("step-")), path.read_bytes()
            if hashlib.sha256(stored[_DIGEST_BYTES:]).digest() == stored[:_DIGEST_BYTES]:
                state = torch.load(io.BytesIO(stored[_DIGEST_BYTES:]), map_location=device, weights_only=True)
                if isinstance(state, dict):
                    return step, state
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
            pass  # not written by a training run, even if its digest matches
        warnings.warn(
            f"{path} is truncated or corrupt; resuming from the checkpoint before it", RuntimeWarning, stacklevel=2
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)
