"""Prompts with an exit layer each -> answers, mixed in one batch; used by all integrations."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import PIL
import torch
import transformers

from exitsafe.engine.generation import NO_MEMORY, Completion
from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.finite import check_finite
from exitsafe.machine.memory import BatchSize
from exitsafe.store.fingerprint import canonical_json, model_fingerprint
from exitsafe.version import __version__

ENCODED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatRequest:
    """A prompt, the exit for its pictures, and decoding settings.

    `temperature` 0 is greedy; `seed`, the prompt's id and the exit layer are the key of every draw. The answer ends
    before the first of the `stop` texts.
    """

    prompt: Prompt
    exit_layer: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """An answer of `num_tokens` generated tokens; `finish_reason` is "length" if `max_new_tokens` cut it off."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]


def answer_chats(
    vlm: VLM, requests: Sequence[ChatRequest], *, batch_size: int | None = None, skip_global: bool = False
) -> list[ChatAnswer]:
    """Answer every request; those with the same decoding settings share batches, whatever their exits.

    Args:
        vlm: The model.
        requests: The requests to answer.
        batch_size: Rows generated at a time; None uses as many as fit in memory. Halved when memory runs out.
        skip_global: As in `VLM.exit_at`.

    Raises:
        RunError: If memory does not suffice for one row.
    """
    groups: dict[tuple[int, float, int], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request.max_new_tokens, request.temperature, request.seed), []).append(index)
    answers: dict[int, ChatAnswer] = {}
    for indices in groups.values():
        group = [requests[index] for index in indices]
        rows = _rows(vlm, group, skip_global=skip_global)
        size = batch_size or vlm.rows_that_fit([row.prompt for row in rows], max_new_tokens=group[0].max_new_tokens)
        for place, completion in vlm.complete(
            rows,
            max_new_tokens=group[0].max_new_tokens,
            temperature=group[0].temperature,
            seed=group[0].seed,
            batch_size=size,
        ):
            answers[indices[place]] = _answer(vlm, completion, group[place].stop)
    return [answers[index] for index in range(len(requests))]


@torch.no_grad()
def log_likelihoods(
    vlm: VLM, pairs: Sequence[tuple[Prompt, str]], exit_layer: int, *, batch_size: int, skip_global: bool = False
) -> list[tuple[float, bool]]:
    """For each pair of a prompt and a continuation: the sum of the continuation's log-probabilities at an exit layer,
    and whether the greedy answer begins with it."""
    by_key: dict[object, list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        by_key.setdefault(vlm.batch_key(prompt), []).append(index)
    found: dict[int, tuple[float, bool]] = {}

    def score(chunk: Sequence[int]) -> None:
        prompts = [pairs[index][0] for index in chunk]
        features = vlm.prompt_features(prompts, [exit_layer], skip_global=skip_global)
        rows = [
            Row(prompt=prompt, exit_layer=exit_layer, features=by_layer[exit_layer])
            for prompt, by_layer in zip(prompts, features, strict=True)
        ]
        hidden, tokens, mask = vlm.response_states(rows, [_continuation(vlm, pairs[index][1]) for index in chunk])
        logits = vlm.logits(hidden)  # (B, T, V)
        logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        sums = torch.where(mask, logprobs, 0.0).sum(dim=1)
        check_finite(sums, rows, what="log-probabilities", dtype=vlm.base_model.dtype)
        is_greedy = ((logits.argmax(dim=-1) == tokens) | ~mask).all(dim=1)
        found.update(zip(chunk, zip(sums.tolist(), is_greedy.tolist(), strict=True), strict=True))

    size = BatchSize(batch_size, problem=NO_MEMORY)
    for indices in by_key.values():
        for _ in size.batches(score, indices):
            pass
    return [found[index] for index in range(len(pairs))]


def model_digest(vlm: VLM, *, batch_size: int | None, skip_global: bool) -> str:
    """Twelve characters that change with everything that may change an answer, except the exit layer."""
    model = {name: value for name, value in model_fingerprint(vlm).items() if name != "name"}
    deciding = {
        "model": model,
        "batch_size": "auto" if batch_size is None else batch_size,
        "skip_global": skip_global,
        "versions": [__version__, str(torch.__version__), transformers.__version__, PIL.__version__],
        "today": vlm.today if vlm.is_dated else None,
    }
    return hashlib.sha256(canonical_json(deciding).encode()).hexdigest()[:12]


def _rows(vlm: VLM, requests: Sequence[ChatRequest], *, skip_global: bool) -> list[Row]:
    rows = []
    for start in range(0, len(requests), ENCODED_AT_ONCE):
        chunk = requests[start : start + ENCODED_AT_ONCE]
        features = vlm.prompt_features(
            [request.prompt for request in chunk],
            sorted({request.exit_layer for request in chunk}),
            skip_global=skip_global,
        )
        rows += [
            Row(prompt=request.prompt, exit_layer=request.exit_layer, features=found[request.exit_layer])
            for request, found in zip(chunk, features, strict=True)
        ]
    return rows


def _continuation(vlm: VLM, text: str) -> torch.Tensor:
    token_ids = vlm.tokenizer(text, add_special_tokens=False).input_ids
    if not token_ids:
        raise InputError("a continuation has no tokens; leave it out")
    return torch.tensor(token_ids)


def _answer(vlm: VLM, completion: Completion, stop: Sequence[str]) -> ChatAnswer:
    def decode(num_tokens: int) -> str:
        return str(vlm.tokenizer.decode(list(completion.token_ids[:num_tokens]), skip_special_tokens=True))

    def is_stopped(num_tokens: int) -> bool:
        return any(text in decode(num_tokens) for text in stop)

    length = len(completion.token_ids)
    if not is_stopped(length):
        text = vlm.decode(completion.token_ids)
        return ChatAnswer(text=text, num_tokens=length, finish_reason=completion.finish_reason)
    num_tokens = bisect_left(range(length), True, key=is_stopped)
    said = decode(num_tokens)
    end = min(place for place in (said.find(text) for text in stop) if place >= 0)
    return ChatAnswer(text=said[:end].strip(), num_tokens=num_tokens, finish_reason="stop")
