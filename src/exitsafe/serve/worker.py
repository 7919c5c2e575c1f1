"""One loaded model in one thread, which answers requests of many callers in one running batch.

A request that arrives while others are being answered joins them at the next step, whatever its exit, length and
decoding. A request that fails or is cancelled does not affect the others.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Event, Thread
from typing import TypeAlias
from uuid import uuid4

from exitsafe.engine.generation import NO_MEMORY, Answer, Finish, Sampling, TokenLogprobs, generate_answers
from exitsafe.engine.prompts import Row
from exitsafe.engine.read_ahead import DEFAULT_NEW_TOKENS
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, RunError
from exitsafe.machine.memory import MOST_ROWS, free_memory, is_out_of_memory, release_memory
from exitsafe.serve.chat import encode_chat
from exitsafe.serve.request import MOST_LOGPROBS, ChatRequest, RequestError

MOST_JOINING = 16  # a running batch at one step: a crowd does not keep those who are being answered waiting
MOST_CHARACTERS = 64  # per token of the context; longer texts are not even tokenised


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token as text, with its log-probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """More of an answer.

    Args:
        text: The text since the last update.
        logprobs: If asked for, a generated token and the most likely ones, for each token since the last update.
        num_prompt_tokens, num_tokens: Of the prompt, and generated so far.
        finish_reason: None while more follows.
    """

    text: str
    logprobs: tuple[tuple[Token, tuple[Token, ...]], ...]
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: Finish | None


Tell: TypeAlias = Callable[[Update | Exception], None]


class Ticket:
    """A submitted request: `tell` receives its updates, or the one exception that ends it."""

    def __init__(self, request: ChatRequest, tell: Tell) -> None:
        self.request, self.tell = request, tell
        is_fresh = request.temperature > 0 and request.seed is None  # draws anew each time
        self.prompt_id = uuid4().hex if is_fresh else request.conversation
        self.is_cancelled = False
        self.is_alone = False  # answered by itself, after a batch with it has failed
        self.answer: Answer | None = None  # once its prompt has been read
        self.sent = ""
        self.num_told = 0  # tokens whose log-probabilities have been told

    def cancel(self) -> None:
        """Stop answering: nobody will read the rest."""
        self.is_cancelled = True


class Worker:
    """Answers requests with one model in its own thread until `close`; nothing else may use the model meanwhile."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self._arriving: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Answer, Ticket] = {}
        self._most_rows = MOST_ROWS
        self._free = free_memory(vlm.device)
        self._closing = Event()
        self._piece = lru_cache(maxsize=2**20)(self._decode_one)
        self._thread = Thread(target=self._work, name="exitsafe-worker", daemon=True)
        self._thread.start()

    def ask(self, request: ChatRequest, tell: Tell) -> Ticket:
        """Submit a request.

        Args:
            request: What to answer.
            tell: Called from the worker's thread with each update (one, unless the answer is streamed) or an error.
        """
        ticket = Ticket(request, tell)
        self._arriving.put(ticket)
        return ticket

    def close(self) -> None:
        """End the thread after its current step; unanswered requests get an error."""
        self._closing.set()
        self._arriving.put(None)
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._receive(may_wait=not self._waiting)
            try:
                for answer in generate_answers(self.vlm, self._take, batch_size=self._most_rows):
                    self._report(answer)
                    if self._closing.is_set():
                        break
            except Exception as error:  # noqa: BLE001 - told to those whom it concerns
                self._recover(error)
        for ticket in (*self._running.values(), *self._waiting):
            ticket.tell(RequestError("the server is stopping", status=503))

    def _receive(self, *, may_wait: bool) -> None:
        """Move what has arrived to those waiting."""
        try:
            while (ticket := self._arriving.get(block=may_wait)) is not None:
                self._waiting.append(ticket)
                may_wait = False
        except queue.Empty:
            pass

    def _take(self, most: int, beside: Sequence[Answer]) -> list[Answer]:
        """The first of those waiting, as long as they may share the batch."""
        self._receive(may_wait=False)
        taken: list[Answer] = []
        while self._waiting and len(taken) < (min(most, MOST_JOINING) if beside else most):
            ticket = self._waiting[0]
            try:
                if not ticket.is_cancelled:
                    answer = ticket.answer = ticket.answer or self._read(ticket)
                    if not self._may_join(ticket, answer, [*beside, *taken]):
                        break
                    self._encode(answer)
                    self._running[answer] = ticket
                    taken.append(answer)
            except Exception as error:  # noqa: BLE001 - its caller is told
                if is_out_of_memory(error) and (beside or taken):
                    release_memory()
                    break
                ticket.tell(error)
            self._waiting.popleft()
        return taken

    def _may_join(self, ticket: Ticket, answer: Answer, others: Sequence[Answer]) -> bool:
        """Whether a request may be answered beside others: its inputs have their shape, and all fit in memory."""
        if not others:
            return True
        prompt, first = answer.row.prompt, others[0].row.prompt
        is_alone = ticket.is_alone or self._running[others[0]].is_alone
        if is_alone or (self.vlm.batch_key(prompt), prompt.text_inputs.keys()) != (
            self.vlm.batch_key(first),
            first.text_inputs.keys(),
        ):
            return False
        together = [*others, answer]
        longest = max(each.sampling.max_new_tokens for each in together)
        prompts = [each.row.prompt for each in together]
        return self.vlm.rows_that_fit(prompts, max_new_tokens=longest, free=self._free) >= len(together)

    def _read(self, ticket: Ticket) -> Answer:
        """Tokenise the conversation and settle the answer's length."""
        request, context = ticket.request, self.vlm.context_length
        num_characters = sum(len(text) for turn in request.turns for text in turn.texts)
        if num_characters > MOST_CHARACTERS * context or len(request.turns) > context:
            raise _too_long(f"the conversation is far longer than this model's context of {context} tokens; shorten it")
        try:
            prompt = encode_chat(self.vlm, request.turns, prompt_id=ticket.prompt_id)
        except InputError as error:
            message = str(error).removeprefix("sample ").removeprefix(f"{ticket.prompt_id}: ")
            raise RequestError(message, param="messages") from error
        num_tokens = len(prompt.input_ids)
        if context - num_tokens < (request.max_new_tokens or 1):
            wanted = "" if request.max_new_tokens is None else f" and {request.max_new_tokens} of the answer"
            raise _too_long(
                f"the prompt's {num_tokens} tokens, pictures included,{wanted} exceed this model's context of "
                f"{context}: shorten the conversation or set a smaller max_tokens"
            )
        sampling = Sampling(
            max_new_tokens=request.max_new_tokens or min(context - num_tokens, DEFAULT_NEW_TOKENS),
            temperature=request.temperature,
            seed=request.seed or 0,
            top_logprobs=request.top_logprobs,
        )
        if sampling.max_new_tokens * (1 + (request.top_logprobs or 0)) > MOST_LOGPROBS:
            raise RequestError("max_tokens times top_logprobs is too large; lower one of them", param="top_logprobs")
        return Answer(row=Row(prompt=prompt, exit_layer=request.exit_layer, features=None), sampling=sampling)

    def _encode(self, answer: Answer) -> None:
        row = answer.row
        [features] = self.vlm.prompt_features([row.prompt], [row.exit_layer])
        answer.row = replace(row, features=features[row.exit_layer])

    def _report(self, answer: Answer) -> None:
        """Tell the caller what is new, and end the answer at a stop text or when nobody reads it."""
        ticket = self._running[answer]
        if ticket.is_cancelled:
            answer.finish_reason = "stop"
        elif ticket.request.is_streamed or ticket.request.stop or answer.finish_reason is not None:
            text = self._text(answer, ticket.request.stop)
            is_safe = text.startswith(ticket.sent) and not text.endswith("\ufffd")
            if answer.finish_reason is not None or (ticket.request.is_streamed and is_safe and text != ticket.sent):
                self._send(answer, ticket, text)
        if answer.finish_reason is not None:
            del self._running[answer]

    def _text(self, answer: Answer, stop: Sequence[str]) -> str:
        """The answer's text up to a stop text, where it ends, or to what may become one."""
        raw = str(self.vlm.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        ends = [place for place in (raw.find(each) for each in stop) if place >= 0]
        if ends:
            answer.finish_reason = "stop"
            raw = raw[: min(ends)]
        elif answer.finish_reason is None:
            raw = raw[: len(raw) - max((_overlap(raw, each) for each in stop), default=0)]
        return raw.strip()

    def _send(self, answer: Answer, ticket: Ticket, text: str) -> None:
        if not text.startswith(ticket.sent):
            ticket.tell(
                RunError("the answer changed when it was generated again in a smaller batch; repeat the request")
            )
            return
        fresh = zip(answer.token_ids[ticket.num_told :], answer.logprobs[ticket.num_told :], strict=False)
        update = Update(
            text=text[len(ticket.sent) :],
            logprobs=tuple(self._tokens(token_id, found) for token_id, found in fresh),
            num_prompt_tokens=len(answer.row.prompt.input_ids),
            num_tokens=len(answer.token_ids),
            finish_reason=answer.finish_reason,
        )
        ticket.sent, ticket.num_told = text, len(answer.token_ids)
        ticket.tell(update)

    def _tokens(self, token_id: int, found: TokenLogprobs) -> tuple[Token, tuple[Token, ...]]:
        (chosen, *top) = (
            Token(token_id=each, text=self._piece(each), logprob=logprob)
            for each, logprob in ((token_id, found.chosen), *found.top)
        )
        return chosen, tuple(top)

    def _decode_one(self, token_id: int) -> str:
        return str(self.vlm.tokenizer.decode([token_id]))

    def _recover(self, error: Exception) -> None:
        """Answer the rows of a failed batch again: in smaller batches if memory ran out, else each by itself.

        One that fails by itself ends with the error.
        """
        tickets = [ticket for ticket in self._running.values() if not ticket.is_cancelled]
        self._running.clear()
        is_short = is_out_of_memory(error)
        if is_short:
            release_memory()
        if len(tickets) == 1:
            tickets[0].tell(RunError(NO_MEMORY) if is_short else error)
            return
        if is_short:
            self._most_rows = max(1, len(tickets) // 2)
        for ticket in tickets:
            ticket.answer, ticket.is_alone = None, not is_short
        self._waiting.extendleft(reversed(tickets))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of `stop`."""
    return next((num for num in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:num])), 0)


def _too_long(message: str) -> RequestError:
    return RequestError(message, param="messages", code="context_length_exceeded")
