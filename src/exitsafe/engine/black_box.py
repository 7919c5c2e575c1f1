"""A served model as a black box: pictures and text in, answers out, whatever runs behind its URL.

It has one exit: the one that it is claimed to run, or 0, "as served". Knows nothing about its weights.
"""

from __future__ import annotations

import base64
import io
import time
import warnings
from collections.abc import Iterator, Sequence

from exitsafe.data.images import num_pixels, open_images
from exitsafe.engine.answering import Decoding, Task
from exitsafe.engine.completion import ChatReply
from exitsafe.engine.endpoint import FILTERED, REFUSED, ChatRequest, Conversation
from exitsafe.engine.generation import Sampling, seed_of
from exitsafe.engine.read_ahead import DEFAULT_NEW_TOKENS
from exitsafe.engine.reader import probe_sample
from exitsafe.engine.served_model import BYTES_IN_FLIGHT, LazyRequests, find_served
from exitsafe.errors import InputError, RunError
from exitsafe.exits.layers import AS_SERVED, ExitLayers, as_served_or_claimed
from exitsafe.records import Response, Sample
from exitsafe.untrusted import JsonObject, without_surrogates

MOST_AT_ONCE = 8
"""Requests in flight unless the caller knows better: a phone answers one at a time, and a provider limits them."""
_CHUNK = 256  # samples between two calls of the judges
_CHARACTERS = 256  # more than the longest token of any vocabulary


class BlackBox:
    """A served model that answers tasks, as `Answering` does for a model that is loaded.

    Args:
        url: The server's address up to /v1, with "#NAME" for one of its models.
        exit_layers: "all" or "default" for the model as served, or the exit that it is claimed to run.
        max_new_tokens, temperature, seed: As in `VLM.generate`; the random draws are the server's.
        batch_size: Requests in flight; None is `MOST_AT_ONCE`.

    Attributes:
        exit_layers: The one exit of its run.
        settings: What a run records of the model: what the server says of it, never its address.

    Raises:
        InputError: If the server has no such model, or a setting is invalid.
        RunError: If the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        exit_layers: ExitLayers = "default",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        self.exit_layers = as_served_or_claimed(exit_layers)
        longest = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        Sampling(max_new_tokens=longest, temperature=temperature, seed=seed)  # checks them
        self.decoding: Decoding = {"max_new_tokens": longest, "temperature": temperature, "seed": seed}
        self._most_at_once = MOST_AT_ONCE if batch_size is None else batch_size
        self.served = find_served(url, what="MODEL")
        self.endpoint = self.served.endpoint
        self.settings: JsonObject = {}

    @property
    def name(self) -> str:
        """The model's name at its server."""
        return self.served.name

    def check(self, samples: Sequence[Sample]) -> None:
        """Ask a harmless question, to detect a server that cannot answer these samples before the first is sent.

        Raises:
            InputError: If a sample has media that no chat request can hold.
            RunError: If the server does not answer.
        """
        for sample in samples:
            if sample.videos or sample.audios:
                raise InputError(
                    f"sample {sample.id}: only text and pictures can be sent to a served model; leave out samples with "
                    "video or audio"
                )
        has_pictures = any(sample.images for sample in samples)
        sample = probe_sample()
        sample = sample if has_pictures else Sample(id=sample.id, prompt=sample.prompt, kind=sample.kind)
        request = ChatRequest(
            messages=_conversation(sample), max_tokens=self.decoding["max_new_tokens"], temperature=0.0
        )
        (reply,) = (found for _, found in self.endpoint.complete([request]))
        if reply.failure not in (None, FILTERED, REFUSED):
            what = "a question about a picture" if has_pictures else "a question"
            raise RunError(
                f"{self.endpoint.where} does not answer {what} in up to {self.decoding['max_new_tokens']} tokens "
                f"({reply.failure}): check what it serves, or ask for shorter answers (--max-new-tokens)"
            )
        server = {
            "owner": self.served.owner,
            "version": self.served.version,
            "fingerprint": (reply.fingerprint or "")[:200],
        }
        self.settings = {
            "name": self.name,
            "family": "served",
            "encoder": "image",
            "num_layers": AS_SERVED,
            "default_exit": AS_SERVED,
            "checkpoint": None,
            "adapter": None,
            "server": {name: value for name, value in server.items() if value},
        }

    def chunks(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """The tasks, some at a time."""
        for start in range(0, len(tasks), _CHUNK):
            yield list(tasks[start : start + _CHUNK])

    def answer(self, tasks: Sequence[Task]) -> Iterator[Response]:
        """Responses in the order of finishing. A request that a content filter refuses gets an empty response.

        Raises:
            RunError: If a request fails. Responses that have arrived by then are yielded first.
        """
        (exit_layer,) = self.exit_layers
        largest = max((_num_bytes(task.sample) for task in tasks), default=1)
        self.endpoint.concurrency = max(1, min(self._most_at_once, BYTES_IN_FLIGHT // largest))
        requests = LazyRequests(len(tasks), lambda index: self._request(tasks[index].sample, exit_layer))
        failure, since, num_filtered = "", time.perf_counter(), 0
        for index, reply in self.endpoint.complete(requests):
            sample = tasks[index].sample
            is_filtered = reply.failure in (FILTERED, REFUSED)
            num_filtered += is_filtered
            if fault := "" if is_filtered else _fault(reply, max_new_tokens=self.decoding["max_new_tokens"]):
                failure = failure or f"{self.endpoint.where} did not answer sample {sample.id}: {fault}"
                continue
            now, before = time.perf_counter(), since
            since = now
            yield Response(
                sample_id=sample.id,
                exit_layer=exit_layer,
                text=without_surrogates(reply.text or "").strip(),
                num_tokens=reply.num_tokens or 0,
                finish_reason=reply.finish_reason or "stop",
                seconds=now - before,
            )
        if num_filtered:
            warnings.warn(
                f"a content filter refused {num_filtered} of {len(tasks)} requests; their answers are empty",
                RuntimeWarning,
                stacklevel=2,
            )
        if failure:
            raise RunError(f"{failure}; answers so far are saved: rerun the same command to resume")

    def _request(self, sample: Sample, exit_layer: int) -> ChatRequest:
        temperature, seed = self.decoding["temperature"], self.decoding["seed"]
        return ChatRequest(
            messages=_conversation(sample),
            max_tokens=self.decoding["max_new_tokens"],
            temperature=temperature,
            seed=seed_of(sample.id, exit_layer, seed=seed) if temperature else 0,
        )


def _fault(reply: ChatReply, *, max_new_tokens: int) -> str:
    """Why a reply is not an answer; empty if it is one."""
    if reply.failure is not None:
        return reply.failure
    if len(reply.text or "") > _CHARACTERS * max_new_tokens:
        return f"the answer is longer than {max_new_tokens} tokens can be"
    return "the server does not report the number of tokens (usage)" if reply.num_tokens is None else ""


def _conversation(sample: Sample) -> Conversation:
    """A sample as OpenAI's API takes it: its pictures without loss, then its text."""
    pictures = []
    for image in open_images(sample):
        content = io.BytesIO()
        image.save(content, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        pictures.append({"type": "image_url", "image_url": {"url": url}})
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    return [*system, {"role": "user", "content": [*pictures, {"type": "text", "text": sample.prompt}]}]


def _num_bytes(sample: Sample) -> int:
    """The most bytes that its request has."""
    return 2**16 + 4 * sum(num_pixels(image, sample.id) for image in sample.images)
