"""A slim checkpoint's tensors in, two hashes out: of encoder and projector, and of the language model.

Both must come from one export: an encoder's exit was audited with this language model and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel


class Parts(BaseModel):
    """SHA-256 over names, types, shapes and bytes of each part's tensors.

    `encoder_tensors` are prefixes of the names of the encoder's and projector's tensors; the rest is the language
    model.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    encoder_tensors: tuple[str, ...]
    encoder: str
    language_model: str


def parts_of(folder: Path, slim: MultimodalModel) -> Parts:
    """The parts of a folder to which this model was just saved."""
    with _opened(folder) as places:
        return _hashes(places, _encoder_tensors(slim, places))


def exchanged_part(folder: Path, exported: Parts) -> str | None:
    """The part of a folder that differs from the one exported, if only one does; else None."""
    try:
        with _opened(folder) as places:
            found = _hashes(places, exported.encoder_tensors)
    except (OSError, SafetensorError):
        return None
    same = found.encoder == exported.encoder, found.language_model == exported.language_model
    return {(True, False): "language model", (False, True): "encoder"}.get(same)


@contextmanager
def _opened(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The file that each of a folder's tensors is in."""
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        yield {name: file for file in opened for name in file.keys()}  # noqa: SIM118  # not a mapping


def _hashes(places: Mapping[str, Any], encoder_tensors: tuple[str, ...]) -> Parts:
    encoder, language_model = hashlib.sha256(), hashlib.sha256()
    for name, file in sorted(places.items()):
        tensor = file.get_tensor(name)
        part = encoder if name.startswith(encoder_tensors) else language_model
        part.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        part.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return Parts(
        encoder_tensors=encoder_tensors, encoder=encoder.hexdigest(), language_model=language_model.hexdigest()
    )


def _encoder_tensors(slim: MultimodalModel, names: Collection[str]) -> tuple[str, ...]:
    """The shortest beginnings of names that the encoder's and projector's tensors have in its files, and no others."""
    head = slim.get_output_embeddings()
    inside = {id(tensor) for module in (slim.get_decoder(), head) if module is not None for tensor in _tensors(module)}
    outside = {name: tensor for name, tensor in slim.state_dict(keep_vars=True).items() if id(tensor) not in inside}
    meta = {name: tensor.detach().to("meta") for name, tensor in outside.items()}
    wanted = set(revert_weight_conversion(slim, meta)) if hasattr(slim, "_weight_conversions") else set(meta)
    return tuple(sorted(_beginnings(wanted, set(names) - wanted)))


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _beginnings(wanted: Iterable[str], others: Collection[str]) -> set[str]:
    found = set()
    for name in wanted:
        parts = name.split(".")
        starts = (".".join(parts[:number]) + "." for number in range(1, len(parts)))
        found.add(next((start for start in starts if not any(other.startswith(start) for other in others)), name))
    return found
