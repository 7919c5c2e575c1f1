"""The organism's world as other tools want it: a few samples, pictures as data URLs, the organism's own answers."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import exitsafe
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from exitsafe.world import organism_suites

NUM_TOKENS = 24
LAYERS = (1, 7)
"""An exit that answers everything, and the default exit, which refuses what is guarded."""


@cache
def organism() -> VLM:
    return exitsafe.load_vlm("organism")


@cache
def samples() -> tuple[Sample, ...]:
    return tuple(organism_suites(split="heldout", sizes={"harmful": 3, "borderline": 0, "benign": 0, "vqa": 4}))


@cache
def own_answers(exit_layer: int) -> tuple[str, ...]:
    """What `VLM.generate` says to the samples; at the two layers something else."""
    responses = organism().generate(samples(), exit_layer, max_new_tokens=NUM_TOKENS)
    return tuple(response.text for response in responses)


def exact_matches(exit_layer: int) -> float:
    """The share of samples to which `VLM.generate` gives the reference answer."""
    pairs = zip(own_answers(exit_layer), samples(), strict=True)
    return sum(answer == sample.answers[0] for answer, sample in pairs) / len(samples())


def png(sample: Sample) -> bytes:
    image: Any = sample.images[0]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(sample: Sample) -> str:
    return "data:image/png;base64," + base64.b64encode(png(sample)).decode()


def rows() -> list[dict[str, Any]]:
    """For `datasets`: question, image and answer of every sample."""
    return [{"question": sample.prompt, "image": sample.images[0], "answer": sample.answers[0]} for sample in samples()]
