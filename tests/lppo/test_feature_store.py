"""Image features kept in memory or computed step by step: the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.vlm import VLM
from exitsafe.exits.features import tensors_in
from exitsafe.lppo.features import FeatureStore
from exitsafe.records import Sample
from tests.lppo.conftest import make_vlm
from tests.tiny_models import noise_image

EXITS = (1, 3, 5)
PLACES = ([3, 3, 3, 0, 7, 5, 5, 3], [1, 1, 1, 5, 3, 1, 1, 5])  # sample 0 has no image


def bits(rows: list[Row]) -> list[tuple[torch.Tensor, ...]]:
    return [(row.prompt.input_ids, *tensors_in([row.prompt.media, row.features])) for row in rows]


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_features_in_memory_and_by_step_agree(family: str, samples: list[Sample]) -> None:
    vlm = make_vlm(family)
    memory, step = (FeatureStore(vlm, samples, EXITS, max_bytes=size).rows(*PLACES) for size in (1e9, 0))
    for one, other in zip(bits(memory), bits(step), strict=True):
        assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(one, other, strict=True))
    for rows in (memory, step):
        assert [row.exit_layer for row in rows] == PLACES[1]
        assert [row.prompt.sample_id for row in rows] == [f"s{index}" for index in PLACES[0]]
        assert rows[3].features is None
        assert rows[0].features is not None


def test_siblings_are_encoded_once(vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(vlm, samples, EXITS, max_bytes=0)
    encoded: list[tuple[str, int]] = []
    prompt_features = VLM.prompt_features

    def count(self: VLM, prompts: Sequence[Prompt], exit_layers: Sequence[int], **settings: Any) -> Any:
        encoded.extend((prompt.sample_id, layer) for prompt in prompts for layer in exit_layers if prompt.media)
        return prompt_features(self, prompts, exit_layers, **settings)

    monkeypatch.setattr(VLM, "prompt_features", count)
    store.rows(*PLACES)
    assert sorted(encoded) == [("s3", 1), ("s3", 5), ("s5", 1), ("s7", 3)]


def test_a_budget_that_is_too_small_is_not_used() -> None:
    """Larger pictures at the end of the list count as what they are."""
    pictures = [noise_image(number, (28, 28) if number < 20 else (84, 84)) for number in range(24)]
    samples = [Sample(id=f"s{i}", prompt="what", images=(image,), kind="benign") for i, image in enumerate(pictures)]
    vlm = make_vlm("llava_next")
    store = FeatureStore(vlm, samples, EXITS, max_bytes=1e9)
    every = [store.rows([index] * len(EXITS), EXITS) for index in range(len(samples))]
    sizes = [
        sum(tensor.nbytes for tensor in tensors_in([rows[0].prompt.media, *(row.features for row in rows)]))
        for rows in every
    ]
    assert max(sizes[20:]) > max(sizes[:20])
    size = sum(sizes)
    for memory, is_kept in ((size, True), (size - 1, False)):
        assert FeatureStore(vlm, samples, EXITS, max_bytes=memory)._is_complete is is_kept
