"""OpenAI's JSON shapes: answers whole and in chunks, lists of models, errors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from exitsafe.serve.request import ChatRequest, RequestError
from exitsafe.serve.worker import Token, Update
from exitsafe.untrusted import JsonObject

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The replies to one request.

    Args:
        reply_id: Names the request in the reply and in the log.
        fingerprint: Changes with everything that may change an answer, except the exit.
    """

    request: ChatRequest
    reply_id: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, update: Update) -> JsonObject:
        """`chat.completion`: the whole answer, from a single update."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": update.text, "refusal": None},
            "logprobs": self._logprobs(update),
            "finish_reason": update.finish_reason,
        }
        return self._object("chat.completion", [choice]) | {"usage": usage(update)}

    def chunk(self, update: Update, *, is_first: bool) -> JsonObject:
        """`chat.completion.chunk`: one update of a streamed answer."""
        delta = ({"role": "assistant"} if is_first else {}) | {"content": update.text}
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(update),
            "finish_reason": update.finish_reason,
        }
        last = {"usage": None} if self.request.includes_usage else {}
        return self._object("chat.completion.chunk", [choice]) | last

    def usage_chunk(self, update: Update) -> JsonObject:
        """The chunk after the last one, if usage is asked for."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(update)}

    def _object(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, update: Update) -> JsonObject | None:
        if self.request.top_logprobs is None:
            return None
        content = [_token(chosen) | {"top_logprobs": [_token(each) for each in top]} for chosen, top in update.logprobs]
        return {"content": content, "refusal": None}


def _token(token: Token) -> JsonObject:
    return {
        "id": token.token_id,
        "token": token.text,
        "bytes": list(token.text.encode()),
        "logprob": max(token.logprob, _LEAST_LOGPROB),
    }


def usage(update: Update) -> JsonObject:
    """Tokens of the prompt, pictures included, and of the answer, its end token included."""
    return {
        "prompt_tokens": update.num_prompt_tokens,
        "completion_tokens": update.num_tokens,
        "total_tokens": update.num_prompt_tokens + update.num_tokens,
    }


def model_list(models: Mapping[str, int], *, context_length: int, created: int) -> JsonObject:
    """`list`: the models served, each with its exit layer."""
    entries = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "exitsafe",
            "max_model_len": context_length,
            "exit_layer": exit_layer,
        }
        for name, exit_layer in models.items()
    ]
    return {"object": "list", "data": entries}


def error_object(error: RequestError) -> JsonObject:
    """OpenAI's error object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
