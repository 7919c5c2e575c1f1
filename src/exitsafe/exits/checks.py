"""What must hold before an encoder's exits can be trusted, measured on one prompt's media.

A check that fails refuses the model; its name is in the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exitsafe.errors import ModelError, first_line
from exitsafe.exits.encoder import Encoder, embeddings_in, find_encoder, media_inputs, other_chains, run_encoder
from exitsafe.exits.features import compute_features, on_device, tensors_in
from exitsafe.exits.model import ExitingModel

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the self-check measured. Differences are relative to the size of the logits.

    Args:
        encoder: Where the encoder is.
        exits: The exits at which the loop was compared.
        alone: Largest difference from `generate` for one prompt at a time.
        mixed: The same for prompts of different lengths and exits in one batch.
        training: The same for the logits that training computes, one row at a time.
        can_pad: Whether prompts of different lengths share a batch; padding changes what a few models compute.
        seconds: How long the check took.
    """

    encoder: Encoder
    exits: tuple[int, ...]
    alone: float
    mixed: float
    training: float
    can_pad: bool
    seconds: float = field(compare=False)


@torch.no_grad()
def prove_exits(model: MultimodalModel, inputs: Mapping[str, Tensor], *, modality: str, name: str) -> Encoder:
    """Find the encoder of a model, measure its default exit, and prove its exits.

    Args:
        model: The model, in evaluation mode.
        inputs: A processor's output for one prompt with a picture or audio clip.
        modality: "image" or "audio".
        name: The model, for messages.

    Raises:
        ModelError: If there is no encoder or more than one, or a check fails.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model, whose answers exitsafe cannot generate")
    media = on_device(model, media_inputs(model, inputs, modality))
    if not media:
        raise ModelError(
            f"{name} has no {modality} encoder: its processor makes nothing that {type(model).__name__} could encode"
        )
    try:
        encoder = find_encoder(model, media, modality=modality, name=name)
    except ModelError:
        raise
    except Exception as error:
        reason = wrong_size(model, media) or f"the model cannot read its {modality}s ({first_line(error)})"
        raise ModelError(f"the processor of {name} does not fit the model: {reason}") from error
    whole = run_encoder(model, modality, media)
    vlm = ExitingModel(model, encoder=encoder, name=name)
    exits = compute_features(vlm, media, vlm.exit_layers, skip_global=False)
    if not _equal(exits[encoder.num_layers][modality], whole):
        raise _failed(
            name, "default exit", f"with all {encoder.num_layers} blocks the features are not the model's own"
        )
    default = encoder.num_layers
    while default > 1 and _equal(exits[default - 1][modality], whole):
        default -= 1
    if same := [layer for layer in range(1, default) if _equal(exits[layer][modality], exits[layer + 1][modality])]:
        raise _failed(name, "distinct exits", f"exits {same[0]} and {same[0] + 1} give the same features")
    vlm.default_exit = default
    middle = (default + 1) // 2
    with ExitStack() as hooks:
        ran: list[nn.Module] = []
        for block in vlm.encoder_blocks[middle:]:
            for module in block.modules():
                if module is not block:
                    hooks.callback(module.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        with vlm.exit_at(middle):
            short = run_encoder(model, modality, media)
    if ran:
        raise _failed(name, "skipped blocks", f"at exit {middle} a later block still computes")
    if not _equal(exits[middle][modality], short):
        raise _failed(name, "replay", f"the features of exit {middle} differ when its blocks are replayed")
    if not _equal(run_encoder(model, modality, media), whole):
        raise _failed(name, "restoring", "after an exit the model is not as it was")
    if encoder.num_layers > 1:
        _refuse_untouched_chains(vlm, media, modality, name=name)
    return replace(encoder, default_exit=default)


def fixed_size(model: MultimodalModel) -> int | None:
    """The size of the square pictures that the encoder reads; None if it reads several sizes, or tiles."""
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    return size if isinstance(size, int) else None


def wrong_size(model: MultimodalModel, media: Mapping[str, Tensor]) -> str | None:
    """What is wrong with pictures that do not have the size that the encoder reads; None if they have it."""
    size, pixels = fixed_size(model), media.get("pixel_values")
    if size is None or pixels is None or pixels.dim() < 4 or pixels.shape[-2:] == (size, size):
        return None
    height, width = pixels.shape[-2:]
    return (
        f"it makes pictures of {width}x{height} pixels, but the image encoder reads {size}x{size}: set the image "
        "processor's size and crop_size to that"
    )


def _refuse_untouched_chains(vlm: ExitingModel, media: Mapping[str, Tensor], modality: str, *, name: str) -> None:
    """Refuse a model with another list of blocks that an exit does not affect: an earlier stage, or a second tower."""

    def run() -> None:
        run_encoder(vlm.base_model, modality, media)

    before = other_chains(vlm.base_model, vlm.encoder, run)
    with vlm.exit_at(1):
        after = other_chains(vlm.base_model, vlm.encoder, run)
    for path, output in before.items():
        if path in after and _equal(output, after[path]):
            raise _failed(
                name,
                "one encoder",
                f"{path} runs too, whatever the exit of {vlm.encoder.path}: an exit would shorten only one of several "
                "stages or towers",
            )


def _equal(one: object, other: object) -> bool:
    """Whether the features are the same, in every bit; hidden states do not count."""
    left, right = _features(one), _features(other)
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def _features(output: object) -> Sequence[Tensor]:
    if isinstance(output, Mapping):
        return [*tensors_in(embeddings_in(output)), *tensors_in(output.get("deepstack_features"))]
    return list(tensors_in(output))


def _failed(name: str, check: str, what: str) -> ModelError:
    return ModelError(f"{name} fails the check of {check}: {what}; exitsafe cannot be used with this model")
