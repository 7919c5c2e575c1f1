"""A synthetic picture and prompt on which two models are compared: logits and milliseconds. Needs no processor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exitsafe.engine.processor import noise_picture

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_TEXT_TOKENS = 32
_WARM_UPS, _TIMES = 2, 15
_MOST_SECONDS = 15.0  # for all repeats; a large model on a CPU is slow enough to be timed once


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Medians over warm repeats for one picture and 32 tokens of text, in milliseconds."""

    encoder_ms: float
    """From pixels to the language model's inputs."""
    prefill_ms: float
    """From pixels and prompt to the first token: the encoder's and the language model's time."""


def probe_inputs(vlm: VLM, *, exit_layer: int) -> dict[str, Tensor]:
    """A processor's output for one picture and a prompt, as the model's own `forward` takes it, on its device.

    The picture is noise of the largest size that the model takes, the prompt is random tokens; the same every time.
    """
    generator = torch.Generator().manual_seed(0)
    images = noise_picture(vlm, generator)
    config = vlm.base_model.config
    reads_across = bool(vlm.family_row.image_cache_layers(vlm.text_config))
    num_image_tokens = 1 if reads_across else _num_features(vlm, images, exit_layer)
    words = torch.randint(3, vlm.text_config.vocab_size, (_TEXT_TOKENS,), generator=generator)
    words[words == config.image_token_id] = 3 if config.image_token_id != 3 else 4
    tokens = torch.cat([words[:1], torch.full((num_image_tokens,), config.image_token_id), words[1:]])[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **images}
    if reads_across:
        num_tiles = images["pixel_values"].shape[2]
        inputs["cross_attention_mask"] = torch.ones(1, tokens.shape[1], 1, num_tiles, dtype=torch.long)
        inputs["cross_attention_mask"][:, :1] = 0  # tokens before the picture do not see it
    dtype = vlm.base_model.dtype
    return {
        name: tensor.to(vlm.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(1, tokens, vocabulary), float32, on the CPU."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


@torch.no_grad()
def encoders_ms(vlms: Sequence[VLM], inputs: Mapping[str, Tensor]) -> list[float]:
    """Encoder times of models on one device, measured in turns, so that a busy moment affects all of them."""
    images = {name: inputs[name] for name in vlms[0].family_row.image_inputs}
    return _medians_ms([partial(vlm.family_row.features, vlm.base_model, images) for vlm in vlms], vlms[0].device)


@torch.no_grad()
def language_model_ms(vlm: VLM, inputs: Mapping[str, Tensor]) -> float:
    """The language model's time from image features and prompt to the first token."""
    family = vlm.family_row
    features = family.features(vlm.base_model, {name: inputs[name] for name in family.image_inputs})
    text = {name: tensor for name, tensor in inputs.items() if name not in family.image_inputs}

    def prefill() -> object:
        return vlm.model(**text, **family.feature_inputs([features]), use_cache=True, logits_to_keep=1)

    return _medians_ms([prefill], vlm.device)[0]


def _medians_ms(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    times: list[list[float]] = []
    begun = time.perf_counter()
    for number in range(_WARM_UPS + _TIMES):
        if times and time.perf_counter() - begun > _MOST_SECONDS:
            break
        found = [_time_ms(call, device) for call in calls]
        if number >= _WARM_UPS:
            times.append(found)
    return [round(statistics.median(of_one), 3) for of_one in zip(*times, strict=True)]


def _time_ms(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return 1000 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_features(vlm: VLM, images: Mapping[str, Tensor], exit_layer: int) -> int:
    """The number of image tokens of the picture."""
    features = vlm.image_features(images, (exit_layer,))
    return sum(image.shape[0] for image in features[exit_layer])
