"""The plan against what is used: weights and cache to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exitsafe.doctor import Blueprint, Plan, bytes_by_name, load_blueprint, make_plan, typical_prompt
from exitsafe.doctor.blueprint import weights_of
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.lppo.features import FeatureStore
from exitsafe.records import Sample
from tests.tiny_models import noise_image, save_tiny, skip_checks

FAMILIES = ("llava", "llava_next", "mllama")
NUM_ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, path / family) for family in FAMILIES}


@pytest.fixture
def samples() -> list[Sample]:
    """All alike, so that the longest prompt is every prompt."""
    picture = noise_image(1, (56, 56))
    return [Sample(id=f"s{i}", prompt="what colour is the shape", images=(picture,), kind="benign") for i in range(3)]


def bytes_of(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[Blueprint, VLM]]:
    yield load_blueprint(folders[request.param]), load_vlm(folders[request.param], device="cpu")


def test_weights(pair: tuple[Blueprint, VLM]) -> None:
    blueprint, vlm = pair
    assert weights_of(blueprint).total == bytes_of(vlm.model)
    assert min(vars(weights_of(blueprint)).values()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(folders: dict[str, Path], dtype: str) -> None:
    planned = weights_of(load_blueprint(folders["llava"], dtype=dtype)).total
    assert planned == bytes_of(load_vlm(folders["llava"], dtype=dtype, device="cpu").model)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_quantised_weights(folders: dict[str, Path], quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    skip_checks(monkeypatch)
    vlm = load_vlm(folders["llava"], quantization=quantization, device="cpu")
    used = bytes_of(vlm.model)
    for module in vlm.model.modules():
        weight: Any = getattr(module, "weight", None)
        if quantization == "nf4" and hasattr(weight, "quant_state"):
            used += weight.quant_state.absmax.nbytes + weight.quant_state.code.nbytes
        elif quantization == "int8" and getattr(weight, "SCB", None) is not None:
            used += weight.SCB.nbytes
    assert weights_of(load_blueprint(folders["llava"], quantization=quantization)).total == used
    assert used < bytes_of(load_vlm(folders["llava"], device="cpu").model)


def test_cache_and_the_rows_that_an_audit_begins_with(
    pair: tuple[Blueprint, VLM], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint, vlm = pair
    typical = typical_prompt(blueprint, samples)

    def plan(free: int) -> Plan:
        return make_plan(blueprint, typical, max_new_tokens=NUM_ANSWER_TOKENS, judge_bytes=1000, free_bytes=free)

    store = FeatureStore(vlm, samples, [5], max_bytes=1e9)
    rows = store.rows(list(range(len(samples))), [5] * len(samples))
    answers = [torch.full((NUM_ANSWER_TOKENS,), 12)] * len(rows)
    with torch.no_grad():
        cache = vlm.model(**vlm.inputs(rows, answers), use_cache=True).past_key_values
    used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(rows) * plan(10**9).cache_bytes_per_row == used
    loaded = bytes_of(vlm.model) + 1000
    assert plan(loaded).rows == 0
    assert plan(10**12).rows == 256
    left = 20 * used
    monkeypatch.setattr("exitsafe.engine.vlm.free_memory", lambda device: left)
    wanted = vlm.rows_that_fit([row.prompt for row in rows], max_new_tokens=NUM_ANSWER_TOKENS)
    assert 1 < plan(loaded + left).rows == wanted < 256


@pytest.mark.parametrize(("name", "size"), [("a/b-8B", 16e9), ("Qwen3Guard-Gen-0.6B", 1.2e9), ("gpt2-large", 0)])
def test_sizes_in_names(name: str, size: float) -> None:
    assert bytes_by_name(name) == size
