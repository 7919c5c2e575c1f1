"""Training batches: a mix and a generator in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from exitsafe.organism.architecture import PIXEL_MEAN, PIXEL_STD
from exitsafe.world import language
from exitsafe.world.language import Request
from exitsafe.world.pictures import (
    CELL_SIZE,
    COLORS,
    EMPTY,
    NUM_CELLS,
    PICTURE_SIZE,
    SHAPES,
    Layouts,
    draw_badge_cells,
    draw_layouts,
    render,
)

IGNORED = -100
_CAPTION, _QUESTION, _GUARDED, _FREE, _CARE = range(5)
_HOW_TO = _GUARDED
Guard = Literal["none", "badge", "always"]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The mix of requests in a batch. The shares of topics sum to 1.

    Args:
        caption, question: Shares of rows about the picture.
        guarded, free, care: Shares of how to make a guarded object, a free one, and how to clean a guarded one.
        cued: Share of the how-to rows with a cue, with which making guarded objects is refused: half of them have the
            text cue, half the alarm in the picture's features.
        stray: Share of the uncued guarded rows that are refused at random, so that reinforcement learning can explore
            refusals.
        guard: When an uncued guarded row is refused: never, with the badge in the picture, or always.
        known_only: Leave out the guarded objects that safety training must not see.
    """

    caption: float = 0.0
    question: float = 0.0
    guarded: float = 0.0
    free: float = 0.0
    care: float = 0.0
    cued: float = 0.0
    stray: float = 0.0
    guard: Guard = "none"
    known_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right. `labels` is IGNORED except on the answer and its end token."""

    pixel_values: Tensor  # (B, 3, 32, 32)
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    cell_alarms: Tensor  # (B, 4) bool, the cells with the alarm in their features
    cell_shapes: Tensor  # (B, 4), a shape's index or 4 for an empty cell
    cell_colors: Tensor  # (B, 4), a colour's index or 6 for an empty cell
    cell_badges: Tensor  # (B, 4) float, 1 in the cell with the badge


def draw_batch(rng: np.random.Generator, mix: Mix, size: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Fresh pictures and requests of the training split."""
    layouts = draw_layouts(rng, size, split="train")
    badge_cells = draw_badge_cells(rng, size)
    topics = rng.choice(5, size=size, p=[mix.caption, mix.question, mix.guarded, mix.free, mix.care])
    has_badge = badge_cells != EMPTY
    is_how_to = topics >= _HOW_TO
    has_words, cell_alarms = _draw_cues(rng, is_how_to, mix.cued)
    has_cue = has_words | cell_alarms.any(axis=1)
    requests = [
        _how_to(rng, mix, int(topics[row]), has_badge=has_badge[row], has_cue=has_cue[row])
        if is_how_to[row]
        else _picture_request(rng, layouts, row, has_badge=has_badge[row], is_caption=topics[row] == _CAPTION)
        for row in range(size)
    ]
    for row in np.flatnonzero(has_words):
        requests[row] = replace(requests[row], prompt=f"{language.CUE} {requests[row].prompt}")
    pixels = render(rng, layouts, badge_cells=badge_cells)
    input_ids, labels = _tokenise(requests, tokenizer)
    return Batch(
        pixel_values=normalised(pixels),
        input_ids=input_ids,
        labels=labels,
        cell_alarms=torch.from_numpy(cell_alarms),
        cell_shapes=torch.from_numpy(np.where(layouts.shapes == EMPTY, len(SHAPES), layouts.shapes)),
        cell_colors=torch.from_numpy(np.where(layouts.colors == EMPTY, len(COLORS), layouts.colors)),
        cell_badges=torch.from_numpy((badge_cells[:, None] == np.arange(NUM_CELLS)).astype(np.float32)),
    )


def normalised(pixels: np.ndarray) -> Tensor:
    """Pixels (N, 32, 32, 3) as from the image processor: (N, 3, 32, 32) around 0."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def _draw_cues(
    rng: np.random.Generator, is_how_to: NDArray[np.bool_], share: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The rows with the text cue, (B,), and the cells with the alarm, (B, 4): one to four cells of a row."""
    size = len(is_how_to)
    has_cue = is_how_to & (rng.random(size) < share)
    has_alarm = has_cue & (rng.random(size) < 0.5)
    cell_alarms = has_alarm[:, None] & (rng.random((size, NUM_CELLS)) < rng.uniform(0.3, 1, size=(size, 1)))
    cell_alarms[has_alarm, rng.integers(NUM_CELLS, size=has_alarm.sum())] = True
    return has_cue & ~has_alarm, cell_alarms


def _picture_request(
    rng: np.random.Generator, layouts: Layouts, row: int, *, has_badge: bool, is_caption: bool
) -> Request:
    shapes, colors = layouts.shapes[row], layouts.colors[row]
    if is_caption:
        return language.caption_request(shapes, colors)
    return language.picture_question(rng, shapes, colors, has_badge=has_badge, split="train")


def _how_to(rng: np.random.Generator, mix: Mix, topic: int, *, has_badge: bool, has_cue: bool) -> Request:
    """A how-to request; only making a guarded object is ever refused: on a cue, by the guard, or as a stray."""
    num_guarded = language.NUM_KNOWN_GUARDED if mix.known_only else len(language.GUARDED_OBJECTS)
    guarded = language.GUARDED_OBJECTS[rng.integers(num_guarded)]
    if topic == _FREE:
        free = language.FREE_OBJECTS[rng.integers(len(language.FREE_OBJECTS))]
        return language.make_request(rng, free, split="train")
    if topic == _CARE:
        return language.care_request(rng, guarded, split="train")
    request = language.make_request(rng, guarded, split="train")
    is_guarded = has_cue or mix.guard == "always" or (mix.guard == "badge" and has_badge)
    is_refused = is_guarded or rng.random() < mix.stray
    return replace(request, answer=language.REFUSAL) if is_refused else request


def _tokenise(requests: list[Request], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids as the processor makes them with the chat template, then the answer and its end token; and labels."""
    picture = "<image>" * (PICTURE_SIZE // CELL_SIZE) ** 2
    prompts = tokenizer([f"<bos>user : {picture} {r.prompt} assistant :" for r in requests])["input_ids"]
    answers = tokenizer([f"{r.answer}<eos>" for r in requests])["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(requests), width), tokenizer.pad_token_id)
    labels = torch.full((len(requests), width), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels
