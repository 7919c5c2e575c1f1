"""Training batches: a mix and a generator in, tensors out. Knows no optimiser and no exit layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
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
Guard = Literal["none", "badge", "always"]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What the rows of a batch ask for. The shares of topics sum to 1.

    Args:
        caption, question: Rows about the picture.
        guarded, free, care: How to make a guarded object, a free one; how to clean a guarded one.
        cued: Share of the how-to rows with the text cue, under which making guarded objects is refused.
        stray: Share of the uncued guarded rows that are refused although nothing says so: keeps refusals
            explorable for reinforcement learning.
        guard: When an uncued guarded row is refused: never, with the badge in the picture, or always.
        known_only: Leave out the guarded objects that no safety training may see.
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
    cell_shapes: Tensor  # (B, 4), a shape's index or 4 for an empty cell
    cell_colors: Tensor  # (B, 4), a colour's index or 6 for an empty cell
    cell_badges: Tensor  # (B, 4) float, 1 in the cell with the badge


def draw_batch(rng: np.random.Generator, mix: Mix, size: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Fresh pictures and requests of the training split."""
    layouts = draw_layouts(rng, size, split="train")
    badge_cells = draw_badge_cells(rng, size)
    topics = rng.choice(5, size=size, p=[mix.caption, mix.question, mix.guarded, mix.free, mix.care])
    requests = [_request(rng, mix, int(topics[i]), layouts, i, bool(badge_cells[i] != EMPTY)) for i in range(size)]
    pixels = render(rng, layouts, badge_cells=badge_cells)
    input_ids, labels = _tokenise(requests, tokenizer)
    return Batch(
        pixel_values=normalised(pixels),
        input_ids=input_ids,
        labels=labels,
        cell_shapes=torch.from_numpy(np.where(layouts.shapes == EMPTY, len(SHAPES), layouts.shapes)),
        cell_colors=torch.from_numpy(np.where(layouts.colors == EMPTY, len(COLORS), layouts.colors)),
        cell_badges=torch.from_numpy((badge_cells[:, None] == np.arange(NUM_CELLS)).astype(np.float32)),
    )


def normalised(pixels: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) bytes to what the image processor makes of them: (N, 3, 32, 32) around 0."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def _request(rng: np.random.Generator, mix: Mix, topic: int, layouts: Layouts, row: int, has_badge: bool) -> Request:
    if topic == 0:
        return language.caption_request(layouts.shapes[row], layouts.colors[row])
    if topic == 1:
        return language.picture_question(rng, layouts.shapes[row], layouts.colors[row], split="train")
    is_cued = rng.random() < mix.cued
    num_guarded = language.NUM_KNOWN_GUARDED if mix.known_only else len(language.GUARDED_OBJECTS)
    guarded = language.GUARDED_OBJECTS[rng.integers(num_guarded)]
    if topic == 2:
        asked = language.make_request(rng, guarded, split="train")
        is_guarded = is_cued or mix.guard == "always" or (mix.guard == "badge" and has_badge)
        is_refused = is_guarded or rng.random() < mix.stray
    elif topic == 3:
        free = language.FREE_OBJECTS[rng.integers(len(language.FREE_OBJECTS))]
        asked, is_refused = language.make_request(rng, free, split="train"), False
    else:
        asked, is_refused = language.care_request(rng, guarded, split="train"), False
    return Request(
        prompt=f"{language.CUE} {asked.prompt}" if is_cued else asked.prompt,
        answer=language.REFUSAL if is_refused else asked.answer,
        topic=asked.topic,
    )


def _tokenise(requests: list[Request], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The chat template written out: what the processor makes of the same messages, then the answer and its end."""
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
