"""Answers for many (prompt, exit layer) rows, mixed in one batch.

Finished rows leave the batch at once and waiting ones take their places, so one long answer does not hold up the
others. Sampling is keyed by (seed, sample id, exit layer, draw): batch size, order and resume cannot change a draw.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from exitsafe.engine.prompts import TEXT_INPUTS, Row
from exitsafe.engine.reader import Reader
from exitsafe.errors import InputError
from exitsafe.exits.finite import check_finite
from exitsafe.machine.memory import BatchSize, as_batch_size

NO_MEMORY = (
    "out of memory while answering a single prompt: use fewer new tokens (max_new_tokens), a smaller dtype, or "
    "quantization"
)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The tokens of one answer, the end-of-sequence token included; `seconds` is its share of the wall time."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else from the full distribution; `draw` adds to the row's."""

    max_new_tokens: int
    temperature: float
    seed: int
    draw: int
    suppress: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: choose 1 or more")
        if self.temperature < 0.0:
            raise InputError(f"temperature={self.temperature}: choose 0 (greedy) or more")


@torch.no_grad()
def complete_rows(
    vlm: Reader, rows: Sequence[Row], sampling: Sampling, *, batch_size: int | BatchSize
) -> Iterator[tuple[int, Completion]]:
    """Answer every row; yields (index into rows, completion) in the order of finishing.

    When memory runs out, unfinished rows are answered again in batches of half the size.

    Raises:
        RunError: If one row does not fit in memory.
    """
    waiting: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        waiting.setdefault(vlm.batch_key(row.prompt), []).append(index)
    for indices in waiting.values():
        # Longest first: memory runs out at once if at all, and neighbours need little padding.
        indices.sort(key=lambda index: -len(rows[index].prompt.input_ids))

    def work(size: int) -> Iterator[tuple[int, Completion]]:
        for indices in waiting.values():
            for index, completion in _complete_queue(vlm, rows, indices, sampling, batch_size=size):
                indices.remove(index)
                yield index, completion

    yield from as_batch_size(batch_size, problem=NO_MEMORY).halving(work)


def _complete_queue(
    vlm: Reader, rows: Sequence[Row], queue: list[int], sampling: Sampling, *, batch_size: int
) -> Iterator[tuple[int, Completion]]:
    stop = torch.tensor(vlm.eos_token_ids, device=vlm.device)
    waiting = list(queue)
    batch: _Batch | None = None
    while waiting or batch is not None:
        started = time.perf_counter()
        num_free = batch_size - (0 if batch is None else len(batch.indices))
        # A refill costs a prefill and a copy of the cache: wait until a quarter of the batch is free.
        if waiting and (batch is None or (batch.can_join and num_free * 4 >= batch_size)):
            joining, waiting = waiting[:num_free], waiting[num_free:]
            fresh = _prefill(vlm, rows, joining, sampling)
            batch = fresh if batch is None else batch.join(fresh)
        else:
            assert batch is not None
            batch.decode(vlm, rows, sampling)
        batch.share_time(time.perf_counter() - started)
        finished = torch.isin(batch.tokens[:, -1], stop) if len(stop) else torch.zeros(len(batch.indices)).bool()
        keep: list[int] = []
        for place, index in enumerate(batch.indices):
            length = batch.lengths[place]
            has_stopped = bool(finished[place])
            if has_stopped or length == sampling.max_new_tokens:
                yield (
                    index,
                    Completion(
                        token_ids=tuple(batch.tokens[place, -length:].tolist()),
                        finish_reason="stop" if has_stopped else "length",
                        seconds=batch.seconds[place],
                    ),
                )
            else:
                keep.append(place)
        if len(keep) < len(batch.indices):
            batch = batch.select(keep) if keep else None


@dataclass(kw_only=True)
class _Batch:
    """Rows being generated. All tensors are right-aligned; unused columns on the left are masked."""

    indices: list[int]  # into the caller's rows
    cache: DynamicCache
    attention_mask: Tensor  # (B, S): the cached tokens
    positions: Tensor  # (..., B): of the newest token; some models give a token several
    tokens: Tensor  # (B, G): generated so far, right-aligned, the newest not yet in the cache
    lengths: list[int]  # generated tokens per row
    draws: Tensor  # (B, max_new_tokens): one uniform number per token to come, float64
    text_inputs: dict[str, Tensor]  # (B, 1, ...): of the next token
    image_layers: frozenset[int]  # layers of the cache that hold image states
    seconds: list[float]
    can_pad: bool

    @property
    def can_join(self) -> bool:
        """Whether another batch's cache can be joined to this one: if its layers all grow by a token at a time, and
        the model can be padded."""
        return self.can_pad and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def decode(self, vlm: Reader, rows: Sequence[Row], sampling: Sampling) -> None:
        """Generate one more token for every row."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(self.indices), 1)], 1)
        self.positions = self.positions + 1
        inputs = vlm.base_model.prepare_inputs_for_generation(
            self.tokens[:, -1:],
            attention_mask=self.attention_mask,
            position_ids=self.positions[..., None],
            past_key_values=self.cache,
            use_cache=True,
            **self.text_inputs,
        )
        outputs = vlm.model(**inputs)
        self.cache = outputs.past_key_values
        asked = [rows[index] for index in self.indices]
        chosen = _choose(outputs.logits[:, -1], self.draws, self.lengths, sampling, asked)
        self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
        self.lengths = [length + 1 for length in self.lengths]

    def share_time(self, seconds: float) -> None:
        share = seconds / len(self.indices)
        self.seconds = [so_far + share for so_far in self.seconds]

    def select(self, keep: Sequence[int]) -> _Batch:
        """Only the rows in `keep`, without the columns that none of them uses."""
        index = torch.tensor(keep, device=self.tokens.device)
        mask = self.attention_mask[index]
        unused = int(mask.long().argmax(dim=1).min()) if self.can_join else 0
        self.cache.reorder_cache(cast(torch.LongTensor, index))
        for number, layer in enumerate(_layers(self.cache) if unused else ()):
            if layer.is_initialized and number not in self.image_layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
        longest = max(self.lengths[place] for place in keep)
        return _Batch(
            indices=[self.indices[place] for place in keep],
            cache=self.cache,
            attention_mask=mask[:, unused:],
            positions=self.positions[..., index],
            tokens=self.tokens[index, -longest:],
            lengths=[self.lengths[place] for place in keep],
            draws=self.draws[list(keep)],  # on the CPU, wherever the model is
            text_inputs={name: tensor[index] for name, tensor in self.text_inputs.items()},
            image_layers=self.image_layers,
            seconds=[self.seconds[place] for place in keep],
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
            indices=self.indices + other.indices,
            cache=self.cache,
            attention_mask=_stack_right(self.attention_mask, other.attention_mask, dim=-1),
            positions=torch.cat([self.positions, other.positions], dim=-1),
            tokens=_stack_right(self.tokens, other.tokens, dim=-1),
            lengths=self.lengths + other.lengths,
            draws=torch.cat([self.draws, other.draws]),
            text_inputs={name: torch.cat([mine, other.text_inputs[name]]) for name, mine in self.text_inputs.items()},
            image_layers=self.image_layers,
            seconds=self.seconds + other.seconds,
            can_pad=self.can_pad,
        )


class _Layer(Protocol):
    """A layer of the cache; uninitialised where nothing was cached (cross-attention without an image)."""

    is_initialized: bool
    keys: Tensor
    values: Tensor


def _layers(cache: DynamicCache) -> list[_Layer]:
    return cast(list[_Layer], cache.layers)


def _prefill(vlm: Reader, rows: Sequence[Row], indices: list[int], sampling: Sampling) -> _Batch:
    """Read the prompts, once each even if several rows share one, and choose each row's first token."""
    chosen_rows = [rows[index] for index in indices]
    different, places = _different(chosen_rows)
    given = vlm.inputs(different)
    inputs = vlm.base_model.prepare_inputs_for_generation(
        past_key_values=DynamicCache(config=vlm.text_config),
        use_cache=True,
        is_first_iteration=True,
        **vlm.only_last_logits,
        **given,
    )
    outputs = vlm.model(**inputs)
    logits, cache, mask = outputs.logits[:, -1], outputs.past_key_values, given["attention_mask"]
    positions = given["position_ids"][..., -1]
    text_inputs = vlm.of_next_token({name: given[name] for name in TEXT_INPUTS if name in given})
    if len(different) < len(chosen_rows):
        index = torch.tensor(places, device=vlm.device)
        logits, mask, positions = logits[index], mask[index], positions[..., index]
        text_inputs = {name: tensor[index] for name, tensor in text_inputs.items()}
        cache.reorder_cache(index)
    draws = torch.stack([_uniforms(row, sampling) for row in chosen_rows])
    first = _choose(logits, draws, [0] * len(indices), sampling, chosen_rows)
    return _Batch(
        indices=indices,
        cache=cache,
        attention_mask=mask,
        positions=positions,
        tokens=first[:, None],
        lengths=[1] * len(indices),
        draws=draws,
        text_inputs=text_inputs,
        image_layers=vlm.image_cache_layers,
        seconds=[0.0] * len(indices),
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


def _choose(logits: Tensor, draws: Tensor, lengths: Sequence[int], sampling: Sampling, rows: Sequence[Row]) -> Tensor:
    """Next token ids (B,) from logits (B, V): the largest, or by inverting the cumulative distribution.

    Raises:
        ModelError: If a row's logits are not a distribution: a token chosen from NaN would pass for an answer.
    """
    dtype = logits.dtype
    logits = suppress_logits(logits, sampling.suppress)
    if sampling.temperature == 0.0:
        largest = logits.argmax(dim=-1)  # NaN counts as largest
        check_finite(logits.gather(-1, largest[:, None]), rows, what="logits", dtype=dtype)
        return largest
    # Inverse-CDF on the CPU in float64: the same draw whatever the device and batch.
    cumulative = (logits.float().cpu().double() / sampling.temperature).softmax(dim=-1).cumsum(dim=-1)
    check_finite(cumulative[:, -1:], rows, what="logits", dtype=dtype)
    uniform = draws.gather(1, torch.tensor(lengths)[:, None]) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniform, right=True)[:, 0]
    return chosen.to(logits.device)


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


def _uniforms(row: Row, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0.0:
        return torch.empty(0, dtype=torch.float64)
    key = f"{sampling.seed}\x1f{row.prompt.sample_id}\x1f{row.exit_layer}\x1f{sampling.draw + row.draw}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _stack_right(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Stack along the batch, right-aligned along `dim`, with zeros on the left of the narrower one."""
    width = max(first.shape[dim], second.shape[dim])
    padded: list[Tensor] = []
    for tensor in (first, second):
        missing = list(tensor.shape)
        missing[dim] = width - tensor.shape[dim]
        padded.append(torch.cat([tensor.new_zeros(missing), tensor], dim=dim) if missing[dim] else tensor)
    return torch.cat(padded)
