"""A served model as a black box: questions in, its answers out, with log-probabilities where it gives them.

What a server says is untrusted: the tokens that it names are looked up in the reference's vocabulary, and numbers are
bounded.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from exitsafe.engine.completion import ChatReply
from exitsafe.engine.endpoint import UNREACHABLE, ChatRequest
from exitsafe.engine.prompts import written
from exitsafe.errors import InputError, RunError
from exitsafe.records import Sample

if TYPE_CHECKING:
    from exitsafe.engine.served_model import ServedModel
    from exitsafe.engine.vlm import VLM
    from exitsafe.untrusted import JsonObject

TOP_LOGPROBS = 5
"""Tokens asked for at each token of an answer: the most that every server gives."""
LOWEST_LOGPROB = -12.0
"""Smaller log-probabilities count as this: they are rounding, and some servers cut them off."""
Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered.

    Args:
        text: The answer, with single spaces.
        token_ids: Its first tokens, as far as they are known.
        top: For each of them, and the one after them, the log-probabilities of the most likely tokens. A key has
            several token ids where the server's name for a token fits several. Empty without log-probabilities.
        num_prompt_tokens: Tokens of the prompt, as the server counted them.
    """

    text: str
    token_ids: Tokens = ()
    top: tuple[Mapping[Tokens, float], ...] = ()
    num_prompt_tokens: int | None = None


@dataclass(kw_only=True)
class Interview:
    """Questions to a model behind an OpenAI-compatible server.

    Args:
        model: Where it is served.
        vlm: The reference, whose vocabulary its tokens are looked up in.
        max_tokens: Longest answer.
    """

    model: ServedModel
    vlm: VLM
    max_tokens: int
    num_requests: int = 0
    has_logprobs: bool | None = field(default=None, init=False)
    """None until the first answer."""

    def ask(self, samples: Sequence[Sample]) -> list[Answer]:
        """The answers to samples, in order. The first call finds out whether there are log-probabilities, so it should
        hold every kind of question.

        Raises:
            RunError: If one is not answered, or has no log-probabilities though the first answers have.
        """
        replies = self._send(samples, top_logprobs=TOP_LOGPROBS if self.has_logprobs is not False else None)
        if self.has_logprobs is None:
            if replies[0].failure not in (None, UNREACHABLE):  # some servers refuse to give log-probabilities
                replies = self._send(samples, top_logprobs=None)
            readable = bool(replies[0].logprobs and any(self._tops(replies[0])))
            self.has_logprobs = readable and all(map(_has_logprobs, replies))
        for reply, sample in zip(replies, samples, strict=True):
            if reply.text is None:
                with_what = "with a picture" if sample.images else "without a picture"
                raise RunError(
                    f"{self._where} did not answer a question {with_what}: {reply.failure}; check that it serves a "
                    f"model {'that takes pictures' if sample.images else 'and is running'}"
                )
            if self.has_logprobs and not _has_logprobs(reply):
                raise RunError(
                    f"{self._where} gave log-probabilities with its first answers and none with a later one: check "
                    "that the address leads to a single server"
                )
        return [self._read(reply) for reply in replies]

    def _send(self, samples: Sequence[Sample], *, top_logprobs: int | None) -> list[ChatReply]:
        requests = [
            ChatRequest(messages=_messages(each), max_tokens=self.max_tokens, top_logprobs=top_logprobs)
            for each in samples
        ]
        self.num_requests += len(requests)
        replies = dict(self.model.endpoint.complete(requests))
        return [replies[index] for index in range(len(samples))]

    def _read(self, reply: ChatReply) -> Answer:
        text = " ".join((reply.text or "").split())
        if not self.has_logprobs:
            return Answer(text=text, num_prompt_tokens=reply.num_prompt_tokens)
        tops = self._tops(reply)
        token_ids = self._answer_ids(reply)
        usable = next((place for place, top in enumerate(tops) if not top), len(tops))
        length = min(usable, len(token_ids) + 1)
        return Answer(
            text=text,
            token_ids=token_ids[: max(0, length - 1)],
            top=tuple(tops[:length]),
            num_prompt_tokens=reply.num_prompt_tokens,
        )

    def _tops(self, reply: ChatReply) -> list[dict[Tokens, float]]:
        """The most likely tokens at each token of an answer that the reference knows."""
        tops = []
        for token in (reply.logprobs or ())[: self.max_tokens]:
            found: dict[Tokens, float] = {}
            for text, token_id, logprob in token.top[:TOP_LOGPROBS]:
                ids = self._vocabulary.ids(text, token_id)
                if ids and not math.isnan(logprob):
                    logprob = min(0.0, max(LOWEST_LOGPROB, logprob))
                    found[ids] = float(np.logaddexp(found[ids], logprob)) if ids in found else logprob
            tops.append(found)
        return tops

    def _answer_ids(self, reply: ChatReply) -> Tokens:
        """The answer's tokens, up to the first that the reference cannot tell."""
        named = [self._vocabulary.ids(token.text, token.token_id) for token in (reply.logprobs or ())]
        usual = self.vlm.tokenizer.encode(reply.text or "", add_special_tokens=False)
        found: list[int] = []
        special = set(self.vlm.special_token_ids)
        for place, ids in enumerate(named[: self.max_tokens]):
            if len(ids) > 1:  # a name that fits several: as the tokenizer would write the text
                ids = tuple(each for each in ids if place < len(usual) and each == usual[place])
            if not ids or ids[0] in special:
                break
            found.append(ids[0])
        return tuple(found)

    @property
    def _where(self) -> str:
        return self.model.endpoint.where

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self.vlm)

    def remarks(self, samples: Sequence[Sample]) -> list[str]:
        """What can be found out without asking a question: how the server writes a prompt, and its context.

        Args:
            samples: The longest questions with a picture, and one without.

        Raises:
            RunError: If its context is too small for them.
        """
        longest = max(len(self.vlm.encode_prompt(sample).input_ids) for sample in samples) + self.max_tokens
        text = next((sample for sample in samples if not sample.images), None)
        props = self._offered("/../props")
        context = _number(props, "default_generation_settings", "n_ctx") or self.model.context_length
        if context is not None and context < longest:
            raise RunError(
                f"{self._where} has a context of {context} tokens, but the questions need {longest}: start it "
                "with a larger one"
            )
        if text is None:
            return []
        messages = _messages(text)
        ours = written(text, self.vlm.processor, self.vlm.placeholders, today=self.vlm.today)
        if props is not None:  # llama.cpp
            theirs = self._offered("/../apply-template", {"messages": messages})
            prompt = None if theirs is None else theirs.get("prompt")
            opening = str(self.vlm.tokenizer.bos_token or "")
            if isinstance(prompt, str):
                same = prompt.removeprefix(opening).strip() == ours.removeprefix(opening).strip()
                return [_TEMPLATE_SAME if same else _TEMPLATE_OTHER]
            return []
        body = {"model": self.model.endpoint.model, "messages": messages, "add_generation_prompt": True}
        tokens = (self._offered("/../tokenize", body) or {}).get("tokens")
        if isinstance(tokens, list) and tokens:  # vLLM
            same = tokens == self.vlm.encode_prompt(text).input_ids.tolist()
            return [_TEMPLATE_SAME if same else _TEMPLATE_OTHER]
        return []

    def _offered(self, path: str, body: Mapping[str, object] | None = None) -> JsonObject | None:
        """What a path answers; None if this kind of server has no such path."""
        try:
            return self.model.endpoint.get_json(path) if body is None else self.model.endpoint.post_json(path, body)
        except InputError:
            return None


_TEMPLATE_SAME = "Its chat template writes a prompt as the reference's does."
_TEMPLATE_OTHER = "Its chat template writes a prompt differently from the reference's."


class _Vocabulary:
    """Token ids by what servers call them: an id, the decoded token, or the tokenizer's own piece."""

    def __init__(self, vlm: VLM) -> None:
        tokenizer = vlm.tokenizer
        every = range(vlm.base_model.get_input_embeddings().weight.shape[0])
        self._texts = [str(text) for text in tokenizer.batch_decode([[each] for each in every])]
        self._pieces: list[Any] = [tokenizer.convert_ids_to_tokens(each) for each in every]
        self._tables: list[dict[str, list[int]]] = [{}, {}, {}]
        for each in every:
            piece = self._pieces[each] or ""
            for table, name in zip(self._tables, (self._texts[each], piece, self._texts[each].strip()), strict=True):
                table.setdefault(name, []).append(each)

    def ids(self, name: str, token_id: int | None) -> Tokens:
        """The tokens that a name may stand for; empty if there is none."""
        if token_id is not None and 0 <= token_id < len(self._texts):
            known = {self._texts[token_id].strip(), self._pieces[token_id], ""}
            if name.strip() in known:
                return (token_id,)
        for table, key in zip(self._tables, (name, name, name.strip()), strict=True):
            if key and key in table:
                return tuple(table[key])
        return ()


def _has_logprobs(reply: ChatReply) -> bool:
    """Whether an answer comes with log-probabilities; an empty one needs none."""
    values = (logprob for token in reply.logprobs or () for *_, logprob in token.top)
    return not (reply.text or "").strip() or not all(map(math.isnan, values))


def _messages(sample: Sample) -> list[dict[str, object]]:
    if not sample.images:
        return [{"role": "user", "content": sample.prompt}]
    content: list[dict[str, object]] = []
    for image in sample.images:
        assert isinstance(image, Image.Image)
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.prompt}]}]


def _number(document: JsonObject | None, *path: str) -> int | None:
    found: Any = document
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
