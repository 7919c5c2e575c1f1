"""One loaded model in one thread, which answers conversations from many callers in batches.

A question asked while a batch runs goes into the next one; exits and decoding settings may differ.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Lock, Thread

from exitsafe.engine.vlm import VLM
from exitsafe.integrations.chat import Turn, encode_chat
from exitsafe.integrations.chat_answers import ChatAnswer, ChatRequest, answer_chats

GATHERING_SECONDS = 0.05  # questions asked at the same time arrive one after the other
MOST_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation to continue at an exit layer; the other fields are as in `ChatRequest`."""

    prompt_id: str
    turns: tuple[Turn, ...]
    exit_layer: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The model's answer; `is_full` if its context had no room for `max_new_tokens` more tokens."""

    answer: ChatAnswer | None
    num_prompt_tokens: int
    is_full: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    question: Question
    future: Future[Reply]


class SharedWorker:
    """Answers questions with one model in its own thread, which ends with the last reference to this object.

    Args:
        vlm: The model; it must not be used otherwise.
        batch_size, skip_global: As in `answer_chats`.
    """

    def __init__(self, vlm: VLM, *, batch_size: int | None = None, skip_global: bool = False) -> None:
        self.vlm = vlm
        self.batch_size = batch_size
        self.skip_global = skip_global
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._running = Lock()
        # the thread must not reference this object, or the model would never be freed
        arguments = (self._jobs, vlm, batch_size, skip_global, self._running)
        Thread(target=_work, args=arguments, name="exitsafe-worker", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def check(self, exit_layer: int) -> None:
        """Raise the error that every answer at this exit would raise; waits for the running batch.

        Raises:
            ExitLayerError, InputError: As `VLM.exit_at`.
        """
        with self._running, self.vlm.exit_at(exit_layer, skip_global=self.skip_global):  # exit_at is not thread-safe
            pass

    def ask(self, question: Question) -> Future[Reply]:
        """Queue a question; cancelling the future removes it, unless its batch is already running."""
        future: Future[Reply] = Future()
        self._jobs.put(_Job(question=question, future=future))
        return future


def _work(
    jobs: queue.SimpleQueue[_Job | None], vlm: VLM, batch_size: int | None, skip_global: bool, running: Lock
) -> None:
    is_open = True
    while is_open:
        batch, is_open = _gather(jobs)
        wanted = [job for job in batch if job.future.set_running_or_notify_cancel()]
        try:
            with running:
                _answer(vlm, wanted, batch_size=batch_size, skip_global=skip_global)
        except Exception as error:  # noqa: BLE001 - each caller raises it
            for job in wanted:
                if not job.future.done():
                    job.future.set_exception(error)
        del batch, wanted  # free finished work now, not at the next question


def _gather(jobs: queue.SimpleQueue[_Job | None]) -> tuple[list[_Job], bool]:
    """The jobs of the next batch, and whether more may follow."""
    batch: list[_Job] = []
    job = jobs.get()
    while job is not None:
        batch.append(job)
        if len(batch) == MOST_AT_ONCE:
            return batch, True
        try:
            job = jobs.get(timeout=GATHERING_SECONDS)
        except queue.Empty:
            return batch, True
    return batch, False


def _answer(vlm: VLM, jobs: Sequence[_Job], *, batch_size: int | None, skip_global: bool) -> None:
    """Answer the jobs; one that cannot be read fails without affecting the others."""
    asked: list[tuple[_Job, ChatRequest]] = []
    for job in jobs:
        try:
            request = _request(vlm, job.question)
        except Exception as error:  # noqa: BLE001 - its caller raises it
            job.future.set_exception(error)
            continue
        if request.max_new_tokens < 1:
            num_tokens = len(request.prompt.input_ids)
            job.future.set_result(Reply(answer=None, num_prompt_tokens=num_tokens, is_full=True))
        else:
            asked.append((job, request))
    if not asked:
        return
    answers = answer_chats(vlm, [request for _, request in asked], batch_size=batch_size, skip_global=skip_global)
    for (job, request), answer in zip(asked, answers, strict=True):
        is_full = request.max_new_tokens < job.question.max_new_tokens and answer.finish_reason == "length"
        reply = Reply(answer=answer, num_prompt_tokens=len(request.prompt.input_ids), is_full=is_full)
        job.future.set_result(reply)


def _request(vlm: VLM, question: Question) -> ChatRequest:
    prompt = encode_chat(vlm, question.turns, prompt_id=question.prompt_id)
    room = vlm.context_length - len(prompt.input_ids)
    request = ChatRequest(
        prompt=prompt,
        exit_layer=question.exit_layer,
        max_new_tokens=question.max_new_tokens,
        temperature=question.temperature,
        seed=question.seed,
        stop=question.stop,
    )
    return request if room >= question.max_new_tokens else replace(request, max_new_tokens=max(0, room))
