from __future__ import annotations

import pytest

from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from tests.tiny_models import noise_image, tiny_model, tiny_processor

FAMILIES = ("llava", "llava-siglip", "llava_next", "mllama")


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> VLM:
    return VLM(tiny_model(request.param), tiny_processor(request.param), name=request.param)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Several lengths, image sizes and image counts, one sample without an image."""
    words = ["what", "colour", "is", "the", "left", "shape", "how", "do", "i", "make", "a", "red", "zorb"]
    num_images = [1, 1, 2, 0, 1, 3, 1]
    return [
        Sample(
            id=f"s{index}",
            prompt=" ".join(words[index : index + 3 + index % 3]),
            images=tuple(noise_image(10 * index + n, (28 + 12 * n, 30 + 9 * index)) for n in range(count)),
            kind="benign",
        )
        for index, count in enumerate(num_images)
    ]
