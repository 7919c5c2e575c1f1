"""Harmless questions that tell candidates apart: pictures of coloured blocks, plain texts, always the same.

Pictures have the size that the model reads, so that preparing them changes nothing, except those of `odd_question`,
which test how they are prepared. Texts are lower-case words with spaces around punctuation, which every tokenizer
splits alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from exitsafe.engine.prompts import Row
from exitsafe.exits.checks import fixed_size
from exitsafe.exporting.candidates import Candidate, Reference
from exitsafe.exporting.served import LOWEST_LOGPROB, TOP_LOGPROBS
from exitsafe.records import Sample
from exitsafe.stats.identification import SMALLEST_DISTANCE, flip_probability

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_TEXTS = (
    "describe the picture .",
    "what color is the circle ?",
    "what color is the square ?",
    "how many shapes are there ?",
    "do you see a blue cross ?",
    "count the shapes .",
    "is the square red",
    "what is the red square",
)
_USUAL_SIZE = 224
_STUDIED_AT_ONCE, _MOST_STUDIED = 12, 480
_ODD_SHAPES = ((1.0, 0.6), (0.6, 1.0), (1.0, 0.45), (0.45, 1.0))

Separations = npt.NDArray[np.float64]
"""(candidates, candidates): how much a question tells each two apart; symmetric."""


class Questions:
    """The questions for one model, by number."""

    def __init__(self, vlm: VLM) -> None:
        self.size = fixed_size(vlm.base_model) or _USUAL_SIZE
        unknown = vlm.tokenizer.unk_token_id
        known = [text for text in _TEXTS if unknown not in vlm.tokenizer.encode(text)]
        self.texts = known or list(_TEXTS)

    def picture_question(self, number: int) -> Sample:
        """A picture of the size that the model reads, and a text."""
        return self._sample(f"picture {number}", number, (self.size, self.size))

    def odd_question(self, number: int) -> Sample:
        """A picture that is not square, no larger than the model reads, and a text."""
        wide, high = _ODD_SHAPES[number % len(_ODD_SHAPES)]
        return self._sample(f"odd picture {number}", number, (round(self.size * wide), round(self.size * high)))

    @staticmethod
    def is_square(sample: Sample) -> bool:
        """Whether a question is a `picture_question`."""
        return any(isinstance(image, Image.Image) and image.width == image.height for image in sample.images)

    def text_question(self, number: int) -> Sample:
        """A text without a picture."""
        return Sample(id=f"text {number}", prompt=self.texts[number % len(self.texts)], kind="benign")

    def _sample(self, name: str, number: int, size: tuple[int, int]) -> Sample:
        text = self.texts[number % len(self.texts)]
        return Sample(id=name, prompt=text, images=(_blocks(number, size),), kind="benign")


def _blocks(number: int, size: tuple[int, int]) -> Image.Image:
    """A grid of 2 to 8 blocks a side in random colours, with sharp or blurred edges."""
    random = np.random.default_rng(number)
    side = int(random.integers(2, 9))
    colours = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    how = Image.Resampling.NEAREST if random.random() < 0.5 else Image.Resampling.BICUBIC
    return Image.fromarray(colours).resize(size, how)


def choose(asked: Separations, offered: dict[int, Separations], *, unit: float) -> int:
    """The number of the question that does most to separate the two candidates that are separated least.

    Args:
        asked: What the questions asked so far tell apart; any shape.
        offered: What each further question would add, by number.
        unit: Smooths the minimum: separations that differ by less count together.
    """
    confusion = {number: float(np.exp(-(asked + added) / unit).sum()) for number, added in offered.items()}
    return min(confusion, key=lambda number: (confusion[number], number))


class Studies:
    """What the reference expects of questions before they are asked."""

    def __init__(
        self,
        reference: Reference,
        candidates: Sequence[Candidate],
        question: Callable[[int], Sample],
        *,
        has_logprobs: bool,
    ) -> None:
        self.reference, self.candidates, self.question = reference, candidates, question
        self.has_logprobs = has_logprobs
        # an answer on which candidates agree still shows how little the server deviates, by at most log 2
        self.least, self.enough = (SMALLEST_DISTANCE, SMALLEST_DISTANCE) if has_logprobs else (0.01, math.log(2))
        self.unit = 0.05 if has_logprobs else 1.0
        self.answers: dict[int, tuple[npt.NDArray[np.str_], npt.NDArray[np.float64]]] = {}
        self.asked: Separations = np.zeros((len(candidates), len(candidates)))
        self.offered: dict[int, Separations] = {}
        self.num_studied = 0

    def best(self, places: npt.NDArray[np.int64], leader: int | None) -> int | None:
        """The number of the question that tells candidates apart best; None if none tells the hardest two apart.

        Args:
            places: The candidates that remain.
            leader: The one of them to tell from the others; None to tell all apart.
        """
        upper = np.triu_indices(len(places), 1)
        ones, others = places[upper[0]], places[upper[1]]
        if leader is not None:
            others = places[places != leader]
            ones = np.full_like(others, leader)
        while not self._suffice(ones, others) and self.num_studied < _MOST_STUDIED:
            for number in range(self.num_studied, self.num_studied + _STUDIED_AT_ONCE):
                self.offered[number] = self._study(number, places)
            self.num_studied += _STUDIED_AT_ONCE
        offered = {number: separations[ones, others] for number, separations in self.offered.items()}
        if len(ones):
            offered = {number: gains for number, gains in offered.items() if (gains > self.least).any()}
        if not offered:
            return None
        number = choose(self.asked[ones, others], offered, unit=self.unit)
        self.asked = self.asked + self.offered.pop(number)
        return number

    def _suffice(self, ones: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> bool:
        """Whether one of the questions on offer separates the two candidates that are separated least."""
        asked = self.asked[ones, others]
        if not self.offered or not asked.size:
            return bool(self.offered)
        weakest = asked == asked.min()
        return any(bool((each[ones, others][weakest] > self.enough).any()) for each in self.offered.values())

    def _study(self, number: int, places: npt.NDArray[np.int64]) -> Separations:
        every = len(self.candidates)
        rows = self.reference.rows(self.question(number), [self.candidates[place] for place in places])
        found = np.zeros((every, every))
        if self.has_logprobs:
            found[np.ix_(places, places)] = self._by_logprobs(rows)
            return found
        texts, margins = np.full(every, "", dtype=object), np.zeros(every)
        for place, (text, margin) in zip(places, self.reference.answers(rows), strict=True):
            texts[place], margins[place] = " ".join(text.split()), margin
        self.answers[number] = texts, margins
        _, in_8_bits, in_4_bits = flip_probability(np.minimum.outer(margins, margins))
        differ = texts[:, None] != texts[None, :]
        separations: Separations = np.where(differ, np.log((1 - in_8_bits) / in_8_bits), -np.log(1 - in_4_bits))
        return separations

    def _by_logprobs(self, rows: Sequence[Row]) -> Separations:
        """The smaller of two candidates' distances from each other, at the first token of the answer."""
        first = torch.cat(list(self.reference.logprobs(rows, [torch.tensor([0])] * len(rows))))  # (M, V)
        first = first.clamp(min=LOWEST_LOGPROB).double()
        values, tokens = first.topk(TOP_LOGPROBS, dim=-1)
        distances = torch.stack(
            [(first[:, ids] - own).abs().mean(dim=-1) for own, ids in zip(values, tokens, strict=True)]
        )
        separations: Separations = torch.minimum(distances, distances.T).numpy()
        return separations
