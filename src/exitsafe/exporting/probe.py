"""A synthetic picture and prompt on which two models are compared: logits and milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exitsafe.engine.prompts import Row
from exitsafe.exits.encoder import media_inputs, run_encoder
from exitsafe.exits.features import compute_features, on_device

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_SIZE, _TEXT = (448, 448), "a picture " * 16
_WARM_UPS, _TIMES = 2, 15
_MOST_SECONDS = 15.0  # for all repeats; a large model on a CPU is slow enough to be timed once


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Medians over warm repeats for one picture of 448 by 448 pixels and 32 words, in milliseconds."""

    encoder_ms: float
    """From pixels to the language model's inputs."""
    prefill_ms: float
    """From pixels and prompt to the first token: the encoder's and the language model's time."""


def probe_inputs(vlm: VLM) -> dict[str, Tensor]:
    """A processor's output for a picture of noise and a prompt, as the model's own `forward` takes it, on its device;
    the same every time."""
    prompt = vlm.probe(size=_SIZE, text=_TEXT)
    tokens = prompt.input_ids[None]
    texts = {name: tensor[None] for name, tensor in prompt.text_inputs.items()}
    texts |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {name: tensor.to(vlm.device) for name, tensor in texts.items()} | on_device(vlm.base_model, prompt.media)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(1, tokens, vocabulary), float32, on the CPU."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


@torch.no_grad()
def encoders_ms(vlms: Sequence[VLM], inputs: Mapping[str, Tensor]) -> list[float]:
    """Encoder times of models on one device, measured in turns, so that a busy moment affects all of them."""
    modality = vlms[0].encoder.modality
    media = media_inputs(vlms[0].base_model, inputs, modality)
    return _medians_ms([partial(run_encoder, vlm.base_model, modality, media) for vlm in vlms], vlms[0].device)


@torch.no_grad()
def language_model_ms(vlm: VLM) -> float:
    """The language model's time from image features and prompt to the first token."""
    prompt = vlm.probe(size=_SIZE, text=_TEXT)
    features = compute_features(vlm, prompt.media, (vlm.num_layers,), skip_global=False)[vlm.num_layers]
    row = Row(prompt=prompt, exit_layer=vlm.num_layers, features=features)

    def prefill() -> object:
        return vlm.model(**vlm.inputs([row]), **vlm.only_last_logits, use_cache=True)

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
