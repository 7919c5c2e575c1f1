"""Times a model at each exit, as on a device: one request at a time; encoder, prefill and decoding separately.

A `VLM` and samples in, times per pass out. Image preprocessing and tokenising are the same at every exit and are not
timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from exitsafe.errors import InputError
from exitsafe.exits.layers import check_exit_layer
from exitsafe.records import Progress, Sample

if TYPE_CHECKING:
    from exitsafe.engine.prompts import Prompt
    from exitsafe.engine.vlm import VLM

NUM_SAMPLES = 8
NUM_REPEATS = 3
NEW_TOKENS = 9
"""Generated in a pass: the first one by the prefill, eight by decoding."""


Milliseconds = Annotated[float, Field(gt=0, le=1e9)]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One request answered once, in milliseconds."""

    encoder_ms: Milliseconds
    """From pixels on the host to features after the projector."""
    prefill_ms: Milliseconds
    """From features to the first logits."""
    decode_ms_per_token: Milliseconds

    def answer_ms(self, num_tokens: int) -> float:
        """The time for a whole answer of `num_tokens` tokens."""
        return self.encoder_ms + self.prefill_ms + (num_tokens - 1) * self.decode_ms_per_token


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Passes of the same requests in the same order at every exit, so that equal indices can be compared."""

    default: tuple[Pass, ...]
    """At the default exit of the untouched model, global blocks included."""
    exits: Mapping[int, tuple[Pass, ...]]
    """By exit layer."""


def measure_latency(
    vlm: VLM,
    samples: Sequence[Sample],
    exit_layers: Sequence[int],
    *,
    num_samples: int = NUM_SAMPLES,
    new_tokens: int = NEW_TOKENS,
    repeats: int = NUM_REPEATS,
    skip_global: bool = False,
    progress: Progress | None = None,
) -> Latency:
    """Time single requests at every exit.

    Every round times each sample at each exit, in a new random order of the exits for each sample, so that a machine
    that slows down affects all of them. The first round warms up and is not counted. Adapters are disabled: merged, as
    they are shipped, they cost nothing.

    Args:
        vlm: The model.
        samples: Samples with pictures are used, evenly spread over the list.
        exit_layers: Exits to time; the default exit is timed with them.
        num_samples: Most samples to use.
        new_tokens: Tokens generated in a pass, 2 or more, regardless of end-of-sequence tokens.
        repeats: Rounds that count.
        skip_global: As in `VLM.exit_at`, at every exit except the default, with which the others are compared.
        progress: Called after every pass.

    Raises:
        InputError: If no sample has a picture, or a number is too small.
        ExitLayerError: If the encoder has no such block.
    """
    from peft import PeftModel

    for name, given, least in (("num_samples", num_samples, 1), ("new_tokens", new_tokens, 2), ("repeats", repeats, 1)):
        if given < least:
            raise InputError(f"{name}={given}: choose {least} or more")
    for exit_layer in exit_layers:
        check_exit_layer(exit_layer, vlm.num_layers)
    prompts = [vlm.encode_prompt(sample) for sample in spread(samples, num_samples)]
    default = (vlm.default_exit, False)
    places = list(dict.fromkeys([default, *((exit_layer, skip_global) for exit_layer in exit_layers)]))
    passes: dict[tuple[int, bool], list[Pass]] = {place: [] for place in places}
    order = random.Random(0)
    done, total = 0, (1 + repeats) * len(prompts) * len(places)
    with vlm.model.disable_adapter() if isinstance(vlm.model, PeftModel) else nullcontext():
        for round_number in range(1 + repeats):
            for prompt in prompts:
                for place in order.sample(places, len(places)):
                    found = _time_pass(vlm, prompt, place[0], skip_global=place[1], new_tokens=new_tokens)
                    if round_number > 0:
                        passes[place].append(found)
                    done += 1
                    if progress is not None:
                        progress(done, total, "" if round_number else "warming up")
    return Latency(
        default=tuple(passes[default]),
        exits={exit_layer: tuple(passes[exit_layer, skip_global]) for exit_layer in exit_layers},
    )


def spread(samples: Sequence[Sample], number: int) -> list[Sample]:
    """Some of the samples that have pictures, evenly spread over the list.

    Raises:
        InputError: If none has a picture, video or audio.
    """
    pictured = [sample for sample in samples if sample.images or sample.videos or sample.audios]
    if not pictured:
        raise InputError(
            "no sample has a picture, video or audio, so every exit takes the same time; use a suite with them"
        )
    number = min(number, len(pictured))
    return [pictured[place * len(pictured) // number] for place in range(number)]


def _time_pass(vlm: VLM, prompt: Prompt, exit_layer: int, *, skip_global: bool, new_tokens: int) -> Pass:
    from exitsafe.engine.prompts import Row

    stamps: list[float] = []
    started = _now(vlm)
    features = vlm.image_features(prompt.media, (exit_layer,), skip_global=skip_global)[exit_layer]
    encoded = _now(vlm)
    # every call of the model is a generation step; the first is the prefill
    recorder = vlm.model.register_forward_hook(lambda *_: stamps.append(_now(vlm)))
    try:
        row = Row(prompt=prompt, exit_layer=exit_layer, features=features)
        answers = vlm.complete(
            [row],
            max_new_tokens=new_tokens,
            temperature=0.0,
            seed=0,
            batch_size=1,
            suppress=vlm.eos_token_ids,
        )
        for _ in answers:
            pass
    finally:
        recorder.remove()
    assert len(stamps) == new_tokens, f"{len(stamps)} calls for {new_tokens} tokens"
    return Pass(
        encoder_ms=1000 * (encoded - started),
        prefill_ms=1000 * (stamps[0] - encoded),
        decode_ms_per_token=1000 * (stamps[-1] - stamps[0]) / (new_tokens - 1),
    )


def _now(vlm: VLM) -> float:
    """Seconds, once the device has finished all queued work."""
    if vlm.device.type != "cpu":
        import torch

        torch.accelerator.synchronize(vlm.device)
    return time.perf_counter()
