"""Whose time is whose, on a clock that only the blocks move; order, warm-up, and a model that stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from exitsafe.engine import latency
from exitsafe.engine.latency import Pass, measure_latency, spread
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError
from exitsafe.records import Sample
from tests.exporting.slim_models import save_adapter
from tests.tiny_models import noise_image, save_tiny, tiny_llava, tiny_model, tiny_processor

SECONDS = {"encoder": 1.0, "global": 10.0, "language": 100.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[int] = []


@pytest.fixture
def clock(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Moved by what lies inside the blocks, which does not run where a block is skipped."""
    clock = Clock()
    monkeypatch.setattr(latency, "_now", lambda vlm: clock.now)
    language = vlm.base_model.model.language_model.layers
    blocks = {
        "encoder": list(vlm.encoder_blocks),
        "global": vlm.global_blocks,
        "language": list(language),
    }
    handles = [
        block.mlp.register_forward_hook(moving(clock, SECONDS[part])) for part in blocks for block in blocks[part]
    ]
    yield clock
    for handle in handles:
        handle.remove()


def moving(clock: Clock, seconds: float) -> Any:
    def move(*_: Any) -> None:
        clock.now += seconds

    return move


def test_each_part_has_its_own_time(vlm: VLM, samples: list[Sample], clock: Clock) -> None:
    found = measure_latency(vlm, samples, (1, 3, 6), num_samples=2, repeats=1, new_tokens=4)
    num_global = len(vlm.global_blocks)
    num_language = len(vlm.base_model.model.language_model.layers)
    for exit_layer, passes in {**found.exits, vlm.default_exit: found.default}.items():
        assert len(passes) == 2
        for one in passes:
            assert one.encoder_ms == 1000 * (exit_layer * SECONDS["encoder"] + num_global * SECONDS["global"])
            assert one.prefill_ms == one.decode_ms_per_token == 1000 * num_language * SECONDS["language"]
            assert one.answer_ms(1) == one.encoder_ms + one.prefill_ms
            assert one.answer_ms(64) == one.answer_ms(1) + 63 * one.decode_ms_per_token


def test_without_global_blocks_the_default_still_has_them(vlm: VLM, samples: list[Sample], clock: Clock) -> None:
    if not vlm.global_blocks:
        with pytest.raises(InputError, match="no global blocks"):
            measure_latency(vlm, samples, (3,), num_samples=1, repeats=1, skip_global=True)
        return
    found = measure_latency(vlm, samples, (3, 6), num_samples=1, repeats=1, skip_global=True)
    assert found.exits[3][0].encoder_ms == 3000
    assert found.exits[6][0].encoder_ms == 6000
    assert found.default[0].encoder_ms == 26000


@pytest.fixture(scope="module")
def llava() -> VLM:
    return VLM(tiny_llava(), tiny_processor("llava"), name="llava")


def test_rounds_are_interleaved_and_the_first_warms_up(
    llava: VLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def note(vlm: VLM, prompt: Any, exit_layer: int, **_: Any) -> Pass:
        asked.append((prompt.sample_id, exit_layer))
        return Pass(encoder_ms=len(asked), prefill_ms=0.0, decode_ms_per_token=0.0)

    monkeypatch.setattr(latency, "_time_pass", note)
    steps: list[tuple[int, int, str]] = []
    found = measure_latency(
        llava, samples, (1, 2, 3), num_samples=2, repeats=2, progress=lambda *step: steps.append(step)
    )
    assert len(asked) == len(steps) == 3 * 2 * 4  # the default exit 5 as well
    by_four = [asked[start : start + 4] for start in range(0, len(asked), 4)]
    assert all({exit_layer for _, exit_layer in four} == {1, 2, 3, 5} for four in by_four)
    assert all(len({sample for sample, _ in four}) == 1 for four in by_four)
    assert len({tuple(exit_layer for _, exit_layer in four) for four in by_four}) > 2
    assert [len(passes) for passes in (found.default, *found.exits.values())] == [4] * 4
    assert min(one.encoder_ms for one in found.default) > 8  # not of the first round
    assert steps[0] == (1, 24, "warming up") and steps[-1] == (24, 24, "")


def test_the_model_stays_as_it_was(samples: list[Sample]) -> None:
    vlm = VLM(tiny_model("mllama"), tiny_processor("mllama"), name="mllama")
    before = vlm.generate(samples[:1], 3, max_new_tokens=6)[0].text
    measure_latency(vlm, samples, (2,), num_samples=1, repeats=1)
    assert vlm.generate(samples[:1], 3, max_new_tokens=6)[0].text == before
    assert not any(hooks(module) for module in vlm.model.modules())


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))


def test_an_end_of_sequence_stops_no_pass(llava: VLM, samples: list[Sample]) -> None:
    """The tiny model ends within a few tokens; times of all its passes are there all the same."""
    assert any(response.num_tokens < 9 for response in llava.generate(samples, 3, max_new_tokens=9))
    found = measure_latency(llava, samples, (3,), num_samples=6, repeats=1)
    assert len(found.exits[3]) == 6
    assert all(one.encoder_ms > 0 and one.prefill_ms > 0 and one.decode_ms_per_token > 0 for one in found.exits[3])


def test_samples_come_from_all_parts_of_the_list() -> None:
    picture = (noise_image(0),)
    samples = [
        Sample(id=str(number), prompt="what", images=picture if number % 2 else (), kind="benign")
        for number in range(20)
    ]
    assert [sample.id for sample in spread(samples, 3)] == ["1", "7", "13"]
    assert len(spread(samples, 50)) == 10
    with pytest.raises(InputError, match="no sample has a picture"):
        spread(samples[::2], 3)


def test_what_cannot_be_timed(llava: VLM, samples: list[Sample]) -> None:
    with pytest.raises(ExitLayerError):
        measure_latency(llava, samples, (7,))
    with pytest.raises(InputError, match="new_tokens=1: choose 2 or more"):
        measure_latency(llava, samples, (1,), new_tokens=1)
    with pytest.raises(InputError, match="repeats=0"):
        measure_latency(llava, samples, (1,), repeats=0)


def test_adapters_are_not_timed_and_act_again_afterwards(tmp_path: Path, samples: list[Sample]) -> None:
    model = save_tiny("llava", tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    vlm = load_vlm(model, adapter=tmp_path / "adapter")
    ran: list[str] = []
    for name, module in vlm.model.named_modules():
        if ".lora_A." in name:
            module.register_forward_hook(lambda *_: ran.append(""))
    measure_latency(vlm, samples, (1, 2), num_samples=1, repeats=1, new_tokens=2)
    assert not ran
    vlm.generate(samples[:1], 2, max_new_tokens=1)
    assert ran
