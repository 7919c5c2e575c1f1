from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig, align
from exitsafe.lppo.config import UNUSED
from exitsafe.records import Response, Sample
from tests.tiny_models import noise_image, tiny_model, tiny_processor

WORDS = ["what", "colour", "is", "the", "left", "shape", "how", "do", "i", "make", "a", "red", "zorb"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture
def vlm() -> VLM:
    return make_vlm("llava")


def make_vlm(family: str) -> VLM:
    return VLM(tiny_model(family), tiny_processor(family), name=family)


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples()


def make_samples() -> list[Sample]:
    """Twelve samples of three kinds and several lengths, every fourth without an image."""
    return [
        Sample(
            id=f"s{index}",
            prompt=" ".join(WORDS[index : index + 2 + index % 4]),
            images=(noise_image(index),) if index % 4 else (),
            kind=("harmful", "benign", "vqa")[index % 3],
            answers=("red",),
        )
        for index in range(12)
    ]


@pytest.fixture
def config() -> LPPOConfig:
    return tiny_config()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `make_vlm("llava")`, `make_samples()`, `CountRed()` and `tiny_config()`."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    align(make_vlm("llava"), make_samples(), reward=CountRed(), config=tiny_config(), out=out)
    return out


def tiny_config(**changes: object) -> LPPOConfig:
    settings: dict[str, object] = {
        "num_steps": 4,
        "batch_size": 8,
        "minibatch_size": 4,
        "microbatch_tokens": 10_000,
        "max_new_tokens": 5,
        "missing_eos_penalty": 1.0,
        "incoherence_penalty": 0.0,  # random weights only babble
        "value_warmup_steps": 1,
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": 3e-3,
        "value_learning_rate": 1e-2,
        "checkpoint_every": 2,
        "gradient_checkpointing": False,  # tiny models need no memory
    }
    unused = UNUSED[changes.get("method", "lppo")]  # type: ignore[index]
    return LPPOConfig(**{name: value for name, value in settings.items() if name not in unused} | changes)  # type: ignore[arg-type]


def count_red(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    """A reward that wants the word red."""
    return [float(response.text.split().count("red")) for response in responses]


class CountRed:
    """`count_red`, with something that happens before call number `at`."""

    def __init__(self, at: int = -1, event: Callable[[], None] = lambda: None) -> None:
        self.calls_left = at
        self.event = event

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        if self.calls_left == 0:
            self.event()
        self.calls_left -= 1
        return count_red(samples, responses)
