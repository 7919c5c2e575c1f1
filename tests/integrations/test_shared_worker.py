"""Questions from many threads: batched, answered as if alone, and one that cannot be read fails alone."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import exitsafe
from exitsafe.errors import InputError
from exitsafe.integrations import shared_worker
from exitsafe.integrations.chat import Turn
from exitsafe.integrations.chat_answers import answer_chats
from exitsafe.integrations.shared_worker import Question, Reply, SharedWorker
from exitsafe.records import Sample
from tests.integrations.worldly import NUM_TOKENS, organism, own_answers, samples


def question(sample: Sample, exit_layer: int, **changes: Any) -> Question:
    turns = (Turn(role="user", parts=(*sample.images, sample.prompt)),)
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, **changes}
    return Question(prompt_id=sample.id, turns=turns, exit_layer=exit_layer, **options)


def text(future: Future[Reply]) -> str:
    answer = future.result(timeout=60).answer
    assert answer is not None
    return answer.text


def test_many_callers_share_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(vlm: Any, requests: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return answer_chats(vlm, requests, **options)

    monkeypatch.setattr(shared_worker, "answer_chats", counted)
    worker = SharedWorker(organism())
    with ThreadPoolExecutor(16) as callers:
        asked = list(callers.map(lambda layer: [worker.ask(question(each, layer)) for each in samples()], [1, 7] * 4))
    for layer, futures in zip([1, 7] * 4, asked, strict=True):
        assert tuple(text(future) for future in futures) == own_answers(layer)
    assert sum(sizes) == 8 * len(samples())
    assert len(sizes) <= 4


def test_one_that_cannot_be_read_fails_alone() -> None:
    worker = SharedWorker(organism())
    sample = samples()[0]
    bad = Question(prompt_id="bad", turns=(Turn(role="assistant", parts=("x",)),), exit_layer=1, max_new_tokens=4)
    torn = Question(prompt_id="torn", turns=(Turn(role="user", parts=(b"no image",)),), exit_layer=1, max_new_tokens=4)
    futures = [worker.ask(each) for each in (bad, question(sample, 1), torn)]
    assert text(futures[1]) == own_answers(1)[0]
    for future, complaint in ((futures[0], "last turn"), (futures[2], "cannot be read")):
        with pytest.raises(InputError, match=complaint):
            future.result(timeout=60)


def test_when_the_model_fails_every_caller_hears_of_it_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = SharedWorker(organism())
    with monkeypatch.context() as broken:
        broken.setattr(shared_worker, "answer_chats", lambda *args, **options: 1 / 0)
        futures = [worker.ask(question(sample, 1)) for sample in samples()]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(timeout=60)
    assert text(worker.ask(question(samples()[0], 7))) == own_answers(7)[0]


def test_an_exit_is_checked_between_batches_not_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    events: list[str] = []

    def slow(vlm: Any, requests: Any, **options: Any) -> Any:
        begun.set()
        checking.join(timeout=0.3)
        events.append("answered")
        return answer_chats(vlm, requests, **options)

    def check() -> None:
        begun.wait(timeout=60)
        worker.check(1)
        events.append("checked")

    monkeypatch.setattr(shared_worker, "answer_chats", slow)
    worker, checking = SharedWorker(organism()), threading.Thread(target=check)
    checking.start()
    assert text(worker.ask(question(samples()[0], 7))) == own_answers(7)[0]
    checking.join(timeout=60)
    assert events == ["answered", "checked"]


def test_what_is_cancelled_in_the_queue_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    going, go = threading.Event(), threading.Event()
    computed: list[str] = []

    def slow(vlm: Any, requests: Any, **options: Any) -> Any:
        computed.extend(request.prompt.sample_id for request in requests)
        going.set()
        assert go.wait(60)
        return answer_chats(vlm, requests, **options)

    monkeypatch.setattr(shared_worker, "answer_chats", slow)
    worker = SharedWorker(organism())
    first, second, third = samples()[:3]
    running = worker.ask(question(first, 1))
    assert going.wait(60)
    waiting, last = worker.ask(question(second, 1)), worker.ask(question(third, 1))
    assert waiting.cancel()
    assert not running.cancel()
    go.set()
    assert text(last) == own_answers(1)[2]
    assert text(running) == own_answers(1)[0]
    assert computed == [first.id, third.id]


def test_answers_end_where_the_model_has_no_room() -> None:
    worker = SharedWorker(organism())
    context = organism().context_length
    words = "mix " * 300
    sample = samples()[0]

    def padded(num_words: int) -> Question:
        turns = (Turn(role="user", parts=(*sample.images, sample.prompt + " mix" * num_words)),)
        return Question(prompt_id="long", turns=turns, exit_layer=1, max_new_tokens=50)

    length = len(organism().encode_prompt(sample).input_ids)
    reply = worker.ask(padded(context - length - 1)).result(timeout=60)
    assert (reply.num_prompt_tokens, reply.is_full) == (context - 1, True)
    assert reply.answer is not None
    assert reply.answer.num_tokens == 1
    for num_words in (context - length, len(words)):
        reply = worker.ask(padded(num_words)).result(timeout=60)
        assert (reply.answer, reply.is_full) == (None, True)


def test_model_and_thread_go_with_the_last_reference() -> None:
    before = threading.active_count()
    vlm = exitsafe.load_vlm("organism")
    worker = SharedWorker(vlm)
    assert text(worker.ask(question(samples()[0], 1))) == own_answers(1)[0]
    [thread] = [each for each in threading.enumerate() if each.name == "exitsafe-worker" and each.is_alive()][-1:]
    model = weakref.ref(vlm.model)
    del worker, vlm
    gc.collect()
    thread.join(timeout=60)
    gc.collect()
    assert not thread.is_alive()
    assert model() is None
    assert threading.active_count() <= before
