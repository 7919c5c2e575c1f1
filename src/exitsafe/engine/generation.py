"""Answers for many (prompt, exit layer) rows, mixed in one batch.

Finished rows leave the batch at once and waiting ones take their places, so one long answer does not hold up the
others. Sampling is keyed by (seed, sample id, exit layer, draw): batch size, order and resume cannot change a draw.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from exitsafe.engine.cache import growing_cache, grows
from exitsafe.engine.prompts import TEXT_INPUTS, Row
from exitsafe.engine.reader import Reader
from exitsafe.errors import InputError
from exitsafe.exits.finite import check_finite
from exitsafe.machine.memory import BatchSize, as_batch_size

NO_MEMORY = (
    "out of memory while answering a single prompt: use fewer new tokens (max_new_tokens), a smaller dtype, or "
    "quantization"
)
Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The tokens of one answer, the end-of-sequence token included; `seconds` is its share of the wall time."""

    token_ids: tuple[int, ...]
    finish_reason: Finish
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a row's tokens are chosen: greedily at temperature 0, else from the full distribution; `draw` adds to the
    row's. `top_logprobs` asks for log-probabilities: the chosen token's and those of that many most likely ones."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    draw: int = 0
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: choose 1 or more")
        if self.temperature < 0.0:
            raise InputError(f"temperature={self.temperature}: choose 0 (greedy) or more")


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The log-probability of a generated token, and the most likely tokens with theirs; at temperature 1."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(kw_only=True, eq=False)
class Answer:
    """A row and what has been generated for it so far; the caller may end it by setting `finish_reason`."""

    row: Row
    sampling: Sampling
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: Finish | None = None
    seconds: float = 0.0
    draws: Tensor | None = None  # (max_new_tokens,): one uniform number per token, float64


@torch.no_grad()
def complete_rows(
    vlm: Reader, rows: Sequence[Row], sampling: Sampling, *, batch_size: int | BatchSize, suppress: Sequence[int] = ()
) -> Iterator[tuple[int, Completion]]:
    """Answer every row; yields (index into rows, completion) in the order of finishing.

    When memory runs out, unfinished rows are answered again in batches of half the size.

    Raises:
        RunError: If one row does not fit in memory.
    """
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(vlm.batch_key(row.prompt), []).append(index)
    for indices in groups.values():
        # Longest first: memory runs out at once if at all, and neighbours need little padding.
        indices.sort(key=lambda index: -len(rows[index].prompt.input_ids))

    def work(size: int) -> Iterator[tuple[int, Completion]]:
        for indices in groups.values():
            index_of = {Answer(row=rows[index], sampling=sampling): index for index in indices}
            for answer in generate_answers(vlm, _taking(list(index_of)), batch_size=size, suppress=suppress):
                if answer.finish_reason is not None:
                    indices.remove(index_of[answer])
                    yield (
                        index_of[answer],
                        Completion(
                            token_ids=tuple(answer.token_ids),
                            finish_reason=answer.finish_reason,
                            seconds=answer.seconds,
                        ),
                    )

    yield from as_batch_size(batch_size, problem=NO_MEMORY).halving(work)


Take: TypeAlias = Callable[[int, Sequence[Answer]], list[Answer]]


@torch.no_grad()
def generate_answers(
    vlm: Reader,
    take: Take,
    *,
    batch_size: int,
    suppress: Sequence[int] = (),
) -> Iterator[Answer]:
    """Generate until nothing is left to take; yields each answer whenever it has another token.

    Args:
        vlm: The model.
        take: Called with the number of free rows and the answers in the batch, before every step that has room; returns
            at most that many new answers, whose prompts may share a batch with the running ones (`Reader.batch_key`).
        batch_size: Most rows at a time.
        suppress: Token ids that must not be chosen.

    Raises:
        ModelError: If a row's logits are not a distribution.
    """
    stop = frozenset(vlm.eos_token_ids)
    batch: _Batch | None = None
    while True:
        started = time.perf_counter()
        num_free = batch_size - (0 if batch is None else len(batch.answers))
        # A refill costs a prefill and a copy of the cache: wait until a quarter of the batch is free.
        has_room = batch is None or (batch.can_join and num_free * 4 >= batch_size)
        newly = take(num_free, () if batch is None else batch.answers) if has_room else []
        if newly:
            fresh = _prefill(vlm, newly, suppress)
            batch = fresh if batch is None else batch.join(fresh)
        elif batch is None:
            return
        else:
            newly = batch.answers
            batch.decode(vlm, suppress)
        batch.share_time(time.perf_counter() - started)
        for answer in newly:
            if answer.token_ids[-1] in stop:
                answer.finish_reason = "stop"
            elif len(answer.token_ids) == answer.sampling.max_new_tokens:
                answer.finish_reason = "length"
            yield answer
        keep = [place for place, answer in enumerate(batch.answers) if answer.finish_reason is None]
        if len(keep) < len(batch.answers):
            batch = batch.select(keep) if keep else None


def _taking(waiting: list[Answer]) -> Take:
    """Takes from a list that is known from the start, in its order."""

    def take(most: int, beside: Sequence[Answer]) -> list[Answer]:
        taken = waiting[:most]
        del waiting[:most]
        return taken

    return take


@dataclass(kw_only=True)
class _Batch:
    """Rows being generated. All tensors are right-aligned; unused columns on the left are masked."""

    answers: list[Answer]
    cache: DynamicCache
    attention_mask: Tensor  # (B, S): the cached tokens
    positions: Tensor  # (..., B): of the newest token; some models give a token several
    newest: Tensor  # (B, 1): the newest token, not yet in the cache
    text_inputs: dict[str, Tensor]  # (B, 1, ...): of the next token
    image_layers: frozenset[int]  # layers of the cache that hold image states
    can_pad: bool

    @property
    def can_join(self) -> bool:
        """Whether another batch's cache can be joined to this one: if its layers all grow by a token at a time, and
        the model can be padded."""
        return self.can_pad and grows(self.cache)

    def decode(self, vlm: Reader, suppress: Sequence[int]) -> None:
        """Generate one more token for every row."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(self.answers), 1)], 1)
        self.positions = self.positions + 1
        inputs = vlm.base_model.prepare_inputs_for_generation(
            self.newest,
            attention_mask=self.attention_mask,
            position_ids=self.positions[..., None],
            past_key_values=self.cache,
            use_cache=True,
            **self.text_inputs,
        )
        outputs = vlm.model(**inputs)
        self.cache = outputs.past_key_values
        self.newest = _extend(self.answers, outputs.logits[:, -1], suppress)

    def share_time(self, seconds: float) -> None:
        for answer in self.answers:
            answer.seconds += seconds / len(self.answers)

    def select(self, keep: Sequence[int]) -> _Batch:
        """Only the rows in `keep`, without the columns that none of them uses."""
        index = torch.tensor(keep, device=self.newest.device)
        mask = self.attention_mask[index]
        unused = int(mask.long().argmax(dim=1).min()) if self.can_join else 0
        self.cache.reorder_cache(cast(torch.LongTensor, index))
        for number, layer in enumerate(_layers(self.cache) if unused else ()):
            if layer.is_initialized and number not in self.image_layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
        return _Batch(
            answers=[self.answers[place] for place in keep],
            cache=self.cache,
            attention_mask=mask[:, unused:],
            positions=self.positions[..., index],
            newest=self.newest[index],
            text_inputs={name: tensor[index] for name, tensor in self.text_inputs.items()},
            image_layers=self.image_layers,
            can_pad=self.can_pad,
        )

    def join(self, other: _Batch) -> _Batch:
        """Both batches as one, left-padded to the wider one."""
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            if not mine.is_initialized:
                continue
            mine.keys = _stack_right(mine.keys, theirs.keys, dim=-2)
            mine.values = _stack_right(mine.values, theirs.values, dim=-2)
        return _Batch(
            answers=self.answers + other.answers,
            cache=self.cache,
            attention_mask=_stack_right(self.attention_mask, other.attention_mask, dim=-1),
            positions=torch.cat([self.positions, other.positions], dim=-1),
            newest=torch.cat([self.newest, other.newest]),
            text_inputs={name: torch.cat([mine, other.text_inputs[name]]) for name, mine in self.text_inputs.items()},
            image_layers=self.image_layers,
            can_pad=self.can_pad,
        )


class _Layer(Protocol):
    """A layer of the cache; uninitialised where nothing was cached (cross-attention without an image)."""

    is_initialized: bool
    keys: Tensor
    values: Tensor


def _layers(cache: DynamicCache) -> list[_Layer]:
    return cast(list[_Layer], cache.layers)


def _prefill(vlm: Reader, answers: list[Answer], suppress: Sequence[int]) -> _Batch:
    """Read the prompts, once each even if several rows share one, and choose each row's first token."""
    different, places = _different([answer.row for answer in answers])
    given = vlm.inputs(different)
    inputs = vlm.base_model.prepare_inputs_for_generation(
        past_key_values=growing_cache(vlm.text_config),
        use_cache=True,
        is_first_iteration=True,
        **vlm.only_last_logits,
        **given,
    )
    outputs = vlm.model(**inputs)
    logits, cache, mask = outputs.logits[:, -1], outputs.past_key_values, given["attention_mask"]
    positions = given["position_ids"][..., -1]
    text_inputs = vlm.of_next_token({name: given[name] for name in TEXT_INPUTS if name in given})
    if len(different) < len(answers):
        index = torch.tensor(places, device=vlm.device)
        logits, mask, positions = logits[index], mask[index], positions[..., index]
        text_inputs = {name: tensor[index] for name, tensor in text_inputs.items()}
        cache.reorder_cache(index)
    return _Batch(
        answers=list(answers),
        cache=cache,
        attention_mask=mask,
        positions=positions,
        newest=_extend(answers, logits, suppress),
        text_inputs=text_inputs,
        image_layers=vlm.image_cache_layers,
        can_pad=vlm.can_pad,
    )


def _different(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows without repetitions of the previous one, and each row's index among them."""
    different: list[Row] = []
    places = []
    for row in rows:
        if not different or not different[-1].asks_the_same(row):
            different.append(row)
        places.append(len(different) - 1)
    return different, places


def _extend(answers: Sequence[Answer], logits: Tensor, suppress: Sequence[int]) -> Tensor:
    """Add to each answer the next token from logits (B, V); returns the tokens, (B, 1)."""
    logprobs = _top_logprobs(answers, logits)
    chosen = _choose(answers, logits, suppress)
    for place, (answer, token) in enumerate(zip(answers, chosen.tolist(), strict=True)):
        answer.token_ids.append(token)
        if place in logprobs:
            every, top = logprobs[place]
            answer.logprobs.append(TokenLogprobs(chosen=float(every[token]), top=top))
    return chosen[:, None]


def _choose(answers: Sequence[Answer], logits: Tensor, suppress: Sequence[int]) -> Tensor:
    """Next token ids (B,) from logits (B, V): the largest, or by inverting the cumulative distribution.

    Raises:
        ModelError: If a row's logits are not a distribution: a token chosen from NaN would pass for an answer.
    """
    dtype, rows = logits.dtype, [answer.row for answer in answers]
    logits = suppress_logits(logits, suppress)
    chosen = logits.argmax(dim=-1)  # NaN counts as largest
    check_finite(logits.gather(-1, chosen[:, None]), rows, what="logits", dtype=dtype)
    sampled = [place for place, answer in enumerate(answers) if answer.sampling.temperature > 0.0]
    if not sampled:
        return chosen
    # Inverse-CDF in float64, so that the batch does not decide the draw
    device = logits.device if logits.device.type != "mps" else torch.device("cpu")  # which has no float64
    temperatures = torch.tensor([[answers[place].sampling.temperature] for place in sampled], dtype=torch.float64)
    cumulative = (logits[sampled].float().to(device).double() / temperatures.to(device)).softmax(dim=-1).cumsum(dim=-1)
    check_finite(cumulative[:, -1:], [rows[place] for place in sampled], what="logits", dtype=dtype)
    uniform = torch.stack([_uniform(answers[place]) for place in sampled]).to(device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniform, right=True)[:, 0]
    chosen[sampled] = drawn.to(logits.device)
    return chosen


def _top_logprobs(answers: Sequence[Answer], logits: Tensor) -> dict[int, tuple[Tensor, tuple[tuple[int, float], ...]]]:
    """By place, for the answers that want them: all log-probabilities, (V,), and the largest with their tokens."""
    found = {}
    for place, answer in enumerate(answers):
        if (num := answer.sampling.top_logprobs) is not None:
            every = logits[place].float().log_softmax(dim=-1).cpu()
            values, tokens = every.topk(min(num, len(every)))
            found[place] = every, tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return found


def ignored_settings(generation_config: GenerationConfig) -> list[str]:
    """Settings of a checkpoint that would change greedy answers and that exitsafe ignores, e.g. `min_length=5`."""
    found = {name: getattr(generation_config, name, None) for name in _NEUTRAL}
    return [f"{name}={value}" for name, value in found.items() if value not in (None, [], {}, _NEUTRAL[name])]


# Settings with which stock `generate` changes greedy answers, and the value that changes nothing.
_NEUTRAL: dict[str, float | None] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "stop_strings": None,
}


def suppress_logits(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Logits with `token_ids` made impossible; a tokenizer may have tokens for which the head has no logit."""
    token_ids = [token for token in token_ids if token < logits.shape[-1]]
    if not token_ids:
        return logits
    return logits.index_fill(-1, torch.tensor(token_ids, device=logits.device), float("-inf"))


def seed_of(sample_id: str, exit_layer: int, *, seed: int, draw: int = 0) -> int:
    """The seed of a row's random draws, below 2**63: the same whatever the batch."""
    key = f"{seed}\x1f{sample_id}\x1f{exit_layer}\x1f{draw}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def _uniform(answer: Answer) -> Tensor:
    """The uniform number, float64, that draws the answer's next token."""
    if answer.draws is None:
        row, sampling = answer.row, answer.sampling
        seed = seed_of(row.prompt.sample_id, row.exit_layer, seed=sampling.seed, draw=sampling.draw + row.draw)
        generator = torch.Generator().manual_seed(seed)
        answer.draws = torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
    return answer.draws[len(answer.token_ids)]


def _stack_right(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Stack along the batch, right-aligned along `dim`, with zeros on the left of the narrower one."""
    width = max(first.shape[dim], second.shape[dim])
    padded: list[Tensor] = []
    for tensor in (first, second):
        missing = list(tensor.shape)
        missing[dim] = width - tensor.shape[dim]
        padded.append(torch.cat([tensor.new_zeros(missing), tensor], dim=dim) if missing[dim] else tensor)
    return torch.cat(padded)
