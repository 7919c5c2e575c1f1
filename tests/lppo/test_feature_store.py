"""Image features kept in memory, in a file, or computed step by step: the same rows, and nothing left behind."""

from __future__ import annotations

import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.errors import RunError
from exitsafe.lppo import align
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.tensor_file import TensorFile
from exitsafe.records import Sample
from exitsafe.vlm import VLM, Prompt, Row
from tests.lppo.conftest import count_red, make_vlm, tiny_config
from tests.tiny_models import noise_image

EXITS = (1, 3, 5)
PLACES = ([3, 3, 3, 0, 7, 5, 5, 3], [1, 1, 1, 5, 3, 1, 1, 5])  # sample 0 has no image


def bits(rows: list[Row]) -> list[tuple[torch.Tensor, ...]]:
    return [(row.prompt.input_ids, *row.prompt.image_inputs.values(), *(row.features or ())) for row in rows]


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_memory_and_file_hold_the_same_bits_and_the_third_way_agrees(
    family: str, samples: list[Sample], tmp_path: Path
) -> None:
    vlm = make_vlm(family)
    in_memory = FeatureStore(vlm, samples, EXITS, max_bytes=1e9)
    in_file = FeatureStore(vlm, samples, EXITS, max_bytes=0, max_disk_bytes=1e9, folder=tmp_path)
    by_step = FeatureStore(vlm, samples, EXITS, max_bytes=0)
    stores = (in_memory, in_file, by_step)
    memory, file, step = (store.rows(*PLACES) for store in stores)
    for one, other, third in zip(bits(memory), bits(file), bits(step), strict=True):
        assert len(one) == len(other) == len(third)
        for a, b, c in zip(one, other, third, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
            assert torch.allclose(a.float(), c.float(), atol=1e-5)
    assert [row.exit_layer for row in file] == PLACES[1]
    assert [row.prompt.sample_id for row in file] == [f"s{index}" for index in PLACES[0]]
    assert file[3].features is None
    assert file[0].features is not None


def test_a_file_spares_the_encoder_and_leaves_nothing_behind(
    vlm: VLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(vlm, samples, EXITS, max_bytes=0, max_disk_bytes=1e9, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []  # also while in use: a killed run leaves nothing
    calls = []
    monkeypatch.setattr(VLM, "prompt_features", lambda *args, **kwargs: calls.append(args))
    kept = store.rows(*PLACES)
    del store
    assert calls == []
    assert all(torch.isfinite(tensor).all() for row in kept for tensor in row.features or ())


def test_siblings_are_encoded_once(vlm: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(vlm, samples, EXITS, max_bytes=0)
    encoded: list[tuple[str, int]] = []
    prompt_features = VLM.prompt_features

    def count(self: VLM, prompts: Sequence[Prompt], exit_layers: Sequence[int], **settings: Any) -> Any:
        encoded.extend((prompt.sample_id, layer) for prompt in prompts for layer in exit_layers if prompt.image_inputs)
        return prompt_features(self, prompts, exit_layers, **settings)

    monkeypatch.setattr(VLM, "prompt_features", count)
    store.rows(*PLACES)
    assert sorted(encoded) == [("s3", 1), ("s3", 5), ("s5", 1), ("s7", 3)]


def test_a_budget_that_is_too_small_is_not_used(tmp_path: Path) -> None:
    """Larger pictures at the end of the list count as what they are."""
    pictures = [noise_image(number, (28, 28) if number < 20 else (84, 84)) for number in range(24)]
    samples = [Sample(id=f"s{i}", prompt="what", images=(image,), kind="benign") for i, image in enumerate(pictures)]
    vlm = make_vlm("llava_next")
    kept = FeatureStore(vlm, samples, EXITS, max_bytes=1e9)._kept
    assert kept is not None
    sizes = [
        sum(tensor.nbytes for row in rows.values() for tensor in row.features or ())
        + sum(tensor.nbytes for tensor in rows[1].prompt.image_inputs.values())
        for rows in kept
    ]
    assert max(sizes[20:]) > max(sizes[:20])
    size = sum(sizes)
    for memory, disk, is_kept in ((size, 0, True), (size - 1, size, True), (size - 1, size - 1, False)):
        store = FeatureStore(vlm, samples, EXITS, max_bytes=memory, max_disk_bytes=disk, folder=tmp_path)
        assert (store._kept is not None) is is_kept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_all_types_and_shapes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    file = TensorFile(tmp_path)
    first = [torch.ones(5, dtype=torch.bool), torch.arange(24).reshape(2, 3, 4).to(dtype), torch.tensor(3).to(dtype)]
    second = [torch.arange(3000).to(dtype), torch.arange(12).reshape(3, 4).T.to(dtype)]
    kept = file.keep(first) + file.keep([]) + file.keep(second)
    del file
    for wanted, found in zip(first + second, kept, strict=True):
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)
        assert found.data_ptr() % found.element_size() == 0  # not every processor reads across words


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    file = TensorFile(tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(RunError, match=r"image features do not fit \(.*\); lower feature_disk_gb"):
            file.keep([torch.zeros(100_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_run_ends_with_the_same_adapter_wherever_its_features_are(samples: list[Sample], tmp_path: Path) -> None:
    adapters = []
    for name, changes in (("memory", {}), ("file", {"feature_cache_gb": 0.0, "feature_disk_gb": 1.0})):
        config = tiny_config(num_steps=2, **changes)
        path = align(make_vlm("llava"), samples, reward=count_red, config=config, out=tmp_path / name)
        adapters.append((path / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
