"""What fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig

from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.machine import memory
from exitsafe.machine.memory import (
    MEASURED,
    MOST_ROWS,
    BatchSize,
    Gauge,
    ImageStates,
    cache_bytes,
    free_memory,
    is_out_of_memory,
    row_bytes,
    rows_that_fit,
)
from exitsafe.records import Sample
from tests.tiny_models import noise_image, tiny_model, tiny_processor

CPU = torch.device("cpu")
# LLaVA-1.5's language model: 2 * 32 layers * 32 heads * 128 * 2 bytes = 0.5 MiB per token
VICUNA = LlamaConfig(
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_size=4096, intermediate_size=11008
)


def test_cache_bytes_by_hand() -> None:
    assert cache_bytes(VICUNA, num_tokens=1000, dtype=torch.bfloat16) == 1000 * 2**19
    grouped = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
    assert cache_bytes(grouped, num_tokens=10, dtype=torch.float32) == 2 * 32 * 8 * 64 * 10 * 4


def test_image_states_stand_in_the_cache_instead_of_text() -> None:
    """Two of the layers hold 300 states each: 30 * 1000 + 2 * 300 of the 32 * 1000 places."""
    images = ImageStates(num_layers=2, per_row=300)
    found = cache_bytes(VICUNA, num_tokens=1000, dtype=torch.bfloat16, images=images)
    assert found == 2**14 * (30 * 1000 + 2 * 300)
    more = row_bytes(VICUNA, num_tokens=1000, dtype=torch.bfloat16, images=ImageStates(num_layers=2, per_row=5000))
    assert more - row_bytes(VICUNA, num_tokens=1000, dtype=torch.bfloat16) == 2 * 2**14 * 2 * 4000


def test_a_model_counts_the_states_that_its_encoder_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLM(tiny_model("mllama"), tiny_processor("mllama"), name="mllama")
    samples = [Sample(id=f"s{n}", prompt="what", images=(noise_image(n),) * n, kind="benign") for n in range(3)]
    prompts = [vlm.encode_prompt(sample) for sample in samples]
    found: list[ImageStates] = []

    def note(*_: object, images: ImageStates, **__: object) -> int:
        found.append(images)
        return 1

    monkeypatch.setattr("exitsafe.engine.vlm.rows_that_fit", note)
    for prompt in prompts:
        vlm.rows_that_fit([prompt], max_new_tokens=4)
    vlm.rows_that_fit(prompts, max_new_tokens=4)
    states = [features[1] for features in vlm.prompt_features(prompts, (1,))]
    wanted = [0 if each is None else each["image"]["pooler_output"].flatten(0, 1).shape[0] for each in states]
    assert [each.per_row for each in found] == [*wanted, max(wanted)]
    assert found[0].num_layers == len(vlm.text_config.cross_attention_layers)


@pytest.mark.parametrize(("free", "rows"), [(0, 1), (2**30, 1), (10 * 2**30, 6), (2**50, MOST_ROWS)])
def test_rows_that_fit(free: int, rows: int) -> None:
    assert rows_that_fit(VICUNA, num_tokens=1000, dtype=torch.bfloat16, free=free) == rows


def test_a_container_and_processes_side_by_side_leave_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    whole = free_memory(CPU)
    assert whole > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(CPU) == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 1000


def test_what_running_out_looks_like() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()])
def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(error: Exception) -> None:
    sizes = []

    def double(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            raise error
        return [2 * item for item in items]

    size = BatchSize(8, problem="too little")
    for _ in range(2):
        found = [item for part in size.batches(double, list(range(10))) for item in part]
        assert found == [2 * item for item in range(10)]
    assert sizes == [8, 4, *[2] * 10]


def test_work_goes_on_behind_what_it_has_given() -> None:
    left = list(range(6))

    def work(size: int) -> Iterator[int]:
        while left:
            if size > 2 and len(left) == 4:
                raise OUT_OF_MEMORY
            yield left.pop(0)

    assert list(BatchSize(8, problem="too little", fits=5).halving(work)) == list(range(6))


@pytest.mark.parametrize(("options", "tried"), [({}, [4, 2, 1]), ({"least": 2}, [4, 2]), ({"is_fixed": True}, [4])])
def test_memory_that_does_not_suffice_for_the_smallest_is_said(options: dict[str, int], tried: list[int]) -> None:
    sizes = []

    def fail(size: int) -> None:
        sizes.append(size)
        raise OUT_OF_MEMORY

    batch_size = BatchSize(4, problem="too little; do that", is_fixed=bool(options.pop("is_fixed", False)))
    with pytest.raises(RunError, match=r"^too little; do that$"):
        batch_size.run(fail, **options)
    assert sizes == tried


def test_other_errors_pass_through() -> None:
    def fail(size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchSize(2, problem="too little").run(fail)


def test_the_process_peak_grows_with_what_is_held_and_never_falls() -> None:
    gauge = Gauge(CPU)
    (before,) = gauge.read().values()
    resident = psutil.Process().memory_info().rss
    assert before >= 0.9 * resident > 10 * 2**20  # the kernel counts in portions
    held = torch.ones((before - resident) // 4 + 2**26)  # 256 MiB above the peak so far
    (during,) = gauge.read().values()
    del held
    (after,) = gauge.read().values()
    assert during >= before + 2**27
    assert after >= during


def test_names_say_what_was_measured() -> None:
    assert set(Gauge(CPU).read()) == {"peak_process_bytes"} < set(MEASURED)


@pytest.mark.gpu
def test_on_a_gpu_each_reading_is_of_its_own_time() -> None:
    gauge = Gauge(torch.device("cuda"))
    gauge.read()
    held = torch.ones(2**26, device="cuda")
    del held
    first, second = gauge.read(), gauge.read()
    assert first["peak_bytes"] >= 2**28 > second["peak_bytes"]
    assert first["peak_reserved_bytes"] >= first["peak_bytes"]
