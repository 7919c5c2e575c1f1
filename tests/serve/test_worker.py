"""The model's thread: one request's failure is its own, memory that runs out costs time only."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from exitsafe.engine import generation
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.exits.finite import not_finite
from exitsafe.records import Sample
from exitsafe.serve import chat
from exitsafe.serve import worker as worker_module
from exitsafe.serve.chat import Turn
from exitsafe.serve.request import ChatRequest
from exitsafe.serve.worker import Update, Worker
from tests.serve.served import until
from tests.serve.worldly import NUM_TOKENS, organism, own_answers, png, samples
from tests.tiny_models import noise_image, tiny_model, tiny_processor


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(organism())
    yield worker
    worker.close()


class Asked:
    """A request handed in, and what is told of it."""

    def __init__(self, worker: Worker, sample: Sample, exit_layer: int = 1, **options: Any) -> None:
        pictures = [png(sample)] if sample.images else []
        settings: dict[str, Any] = {
            "model": f"organism@L{exit_layer}",
            "exit_layer": exit_layer,
            "turns": (Turn(role="user", parts=(*pictures, sample.prompt)),),
            "max_new_tokens": NUM_TOKENS,
            "temperature": 0.0,
            "seed": None,
            "stop": (),
            "top_logprobs": None,
            "is_streamed": False,
            "includes_usage": False,
        }
        self.told: queue.SimpleQueue[Update | Exception] = queue.SimpleQueue()
        self.ticket = worker.ask(ChatRequest(**(settings | options)), self.told.put)

    def next(self) -> Update:
        told = self.told.get(timeout=60)
        if isinstance(told, Exception):
            raise told
        return told

    def text(self) -> str:
        texts = []
        while True:
            update = self.next()
            texts.append(update.text)
            if update.finish_reason is not None:
                return "".join(texts)


def test_one_that_cannot_be_read_fails_alone(worker: Worker) -> None:
    torn = Asked(worker, samples()[0], turns=(Turn(role="user", parts=(b"no picture",)),))
    good = [Asked(worker, sample) for sample in samples()]
    with pytest.raises(InputError, match="cannot be read") as caught:
        torn.next()
    assert "sample" not in str(caught.value)
    assert tuple(each.text() for each in good) == own_answers(1)


def test_without_a_length_it_is_that_of_generate(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(organism(), "eos_token_ids", ())
    update = Asked(worker, samples()[0], max_new_tokens=None).next()
    assert update.num_tokens == organism().context_length - update.num_prompt_tokens
    assert update.finish_reason == "length"
    monkeypatch.setattr(worker_module, "DEFAULT_NEW_TOKENS", 30)
    assert Asked(worker, samples()[0], max_new_tokens=None).next().num_tokens == 30


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_row_that_breaks_its_batch_fails_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """Numbers that are not finite end a batch in the middle; everybody else's answer is as ever."""
    choose = generation._choose

    def broken(answers: Any, logits: Any, suppress: Any) -> Any:
        for answer in answers:
            if answer.row.exit_layer == 5 and len(answer.token_ids) == 3:
                raise not_finite("logits", exit_layer=5, dtype=torch.float16)
        return choose(answers, logits, suppress)

    monkeypatch.setattr(generation, "_choose", broken)
    asked = [Asked(worker, sample, is_streamed=is_streamed) for sample in samples()]
    bad = Asked(worker, samples()[0], 5)
    asked += [Asked(worker, sample, 7, is_streamed=is_streamed) for sample in samples()]
    with pytest.raises(ModelError, match="exit 5: logits are NaN or infinite"):
        bad.next()
    assert tuple(each.text() for each in asked) == own_answers(1) + own_answers(7)


@pytest.mark.parametrize("most", [3, 0])
def test_memory_that_runs_out(worker: Worker, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    decode, sizes = generation._Batch.decode, []

    def short(batch: Any, *arguments: Any) -> None:
        sizes.append(len(batch.answers))
        if len(batch.answers) > most:
            raise torch.OutOfMemoryError
        decode(batch, *arguments)

    monkeypatch.setattr(generation._Batch, "decode", short)
    asked = [Asked(worker, sample, is_streamed=True) for sample in samples()]
    if most:
        assert tuple(each.text() for each in asked) == own_answers(1)
        assert max(sizes) > most
        return
    for each in asked:
        with pytest.raises(RunError, match="out of memory while answering a single prompt"):
            each.text()
    monkeypatch.undo()
    assert Asked(worker, samples()[0]).text() == own_answers(1)[0]


def test_no_more_rows_than_fit_are_answered_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, join = [], generation._Batch.join

    def joined(mine: Any, other: Any) -> Any:
        both = join(mine, other)
        sizes.append(len(both.answers))
        return both

    monkeypatch.setattr(generation._Batch, "join", joined)
    for most in (5, 2):
        sizes.clear()
        monkeypatch.setattr(VLM, "rows_that_fit", lambda *prompts, most=most, **options: most)
        worker = Worker(organism())
        asked = [Asked(worker, sample) for sample in samples() * 4]
        assert tuple(each.text() for each in asked) == own_answers(1) * 4
        worker.close()
        assert max(sizes) == most


def test_a_request_that_is_given_up_while_it_waits_is_never_begun(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], chat.encode_chat
    later: list[Asked] = []

    def encode_slowly(vlm: VLM, turns: Any, *, prompt_id: str) -> Any:
        encoded.append(prompt_id)
        until(lambda: later and later[0].ticket.is_cancelled)
        return encode(vlm, turns, prompt_id=prompt_id)

    monkeypatch.setattr(worker_module, "encode_chat", encode_slowly)
    first = Asked(worker, samples()[0])
    until(lambda: encoded)
    later.append(Asked(worker, samples()[1]))
    later[0].ticket.cancel()
    assert first.text() == own_answers(1)[0]
    assert Asked(worker, samples()[2]).text() == own_answers(1)[2]
    assert len(encoded) == 2
    assert later[0].told.empty()


def test_closing_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(organism(), "eos_token_ids", ())
    worker = Worker(organism())
    asked = Asked(worker, samples()[0], max_new_tokens=100, is_streamed=True)
    asked.next()
    worker.close()
    with pytest.raises(InputError, match="the server is stopping"):
        asked.text()


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_prompts_with_and_without_pictures_share_what_they_can(family: str) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    both = [
        Sample(
            id=f"s{n}", prompt="what is the left shape " * (1 + n), images=(noise_image(n),) * (n % 2), kind="benign"
        )
        for n in range(6)
    ]
    expected = [vlm.generate([sample], 1 + n, max_new_tokens=6)[0].text for n, sample in enumerate(both)]
    worker = Worker(vlm)
    asked = [Asked(worker, sample, 1 + n, max_new_tokens=6) for n, sample in enumerate(both)]
    assert [each.text() for each in asked] == expected
    worker.close()
