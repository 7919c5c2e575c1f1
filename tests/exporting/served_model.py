"""An OpenAI-compatible server on this machine whose answers a model computes, at any exit and with any fault."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from exitsafe.engine.vlm import VLM
from exitsafe.exporting.candidates import Candidate, Reference
from exitsafe.records import Sample
from tests.judges.chat_server import Answer, ChatServer, failing, serving


@dataclass
class FakeServer:
    """Answers chat completions as a runtime with one exit would.

    Args:
        vlm: The model.
        runs: What it runs.
        has_logprobs: Whether it gives log-probabilities.
        takes_pictures: Whether it accepts pictures.

    The client that it is asked by may use the same model, but only while it waits for an answer.
    """

    vlm: VLM
    runs: Candidate
    has_logprobs: bool = True
    takes_pictures: bool = True
    samples: list[Sample] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def serving(self, **paths: object) -> Iterator[str]:
        """The base URL, with answers at further paths."""
        listed = {"v1/models": {"data": [{"id": "m"}]}} | paths
        fixed = {f"/{path}": Answer(body=json.dumps(answer).encode()) for path, answer in listed.items()}
        with serving(ChatServer(self.answer), paths=fixed) as url:
            yield url

    def answer(self, body: dict[str, Any], number: int) -> Answer:
        with self._lock:  # an exit belongs to one thread
            return self._answer(body)

    def _answer(self, body: dict[str, Any]) -> Answer:
        sample = _sample(body["messages"][-1]["content"])
        self.samples.append(sample)
        if sample.images and not self.takes_pictures:
            return failing(400, message="image input is not supported")
        reference = Reference(self.vlm, max_new_tokens=body["max_tokens"])
        (row,) = reference.rows(sample, [self.runs])
        done = self.vlm.complete([row], max_new_tokens=body["max_tokens"], temperature=0.0, seed=0, batch_size=1)
        (completion,) = (completion for _, completion in done)
        tokens = completion.token_ids
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": self.vlm.decode(tokens)},
            "finish_reason": completion.finish_reason,
        }
        if self.has_logprobs and body.get("logprobs"):
            (logprobs,) = reference.logprobs([row], [reference.readable(tokens)])
            content = self._content(logprobs, tokens[: len(logprobs)], num_top=body["top_logprobs"])
            choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": len(row.prompt.input_ids), "completion_tokens": len(tokens)}
        return Answer(body=json.dumps({"choices": [choice], "usage": usage, "model": "m"}).encode())

    def _content(self, logprobs: torch.Tensor, tokens: Sequence[int], *, num_top: int) -> list[dict[str, Any]]:
        content = []
        for at, token in zip(logprobs, tokens, strict=True):
            values, ids = at.topk(num_top)
            top = [self._named(int(each), float(value)) for each, value in zip(ids, values, strict=True)]
            content.append({**self._named(token, float(at[token])), "top_logprobs": top})
        return content

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.vlm.tokenizer.decode([token]), "logprob": logprob}


def _sample(content: str | list[dict[str, Any]]) -> Sample:
    if isinstance(content, str):
        return Sample(id="asked", prompt=content, kind="benign")
    images = [
        Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        for part in content
        if part["type"] == "image_url"
    ]
    (text,) = (part["text"] for part in content if part["type"] == "text")
    return Sample(id="asked", prompt=text, images=tuple(images), kind="benign")
