"""Which exit does a served model run? The audited model and a server in; the exit out, or why none can be named.

1. What costs nothing: how the server writes a prompt, and its context.
2. Texts without a picture, which no exit affects: how much the server deviates anyway (other kernels, fewer bits).
3. Pictures of the model's own size, each chosen to tell the remaining candidates apart, until one is established or
   all are excluded (`exitsafe.stats.identification` has the rule and its error level).
4. If an exit was named from log-probabilities: pictures that are not square, to see how the server prepares them.
5. If it is not what was claimed: the rest of the questions, to count how many answers that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from exitsafe.engine.served_model import ServedModel
from exitsafe.errors import InputError
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exporting.candidates import Candidate, Reference, candidates_of, preparations_of
from exitsafe.exporting.questions import Questions, Studies
from exitsafe.exporting.served import LOWEST_LOGPROB, Answer, Interview
from exitsafe.records import Progress, Sample
from exitsafe.stats.identification import (
    answer_ratios,
    bound,
    distance_ratios,
    fit_ratios,
    flip_probability,
)

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

ERROR = 0.01
MAX_REQUESTS = 64
MAX_NEW_TOKENS = 16
NUM_TEXTS = 4
NUM_ODD = 8
FIT = (0.03, 4.0, 0.5)
"""A candidate fits a question if its distance is at most 4 times that of texts without a picture; not less than 0.03,
and not more than 0.5, which no model in 4 bits reached."""
LARGE_DEVIATION = 0.1
"""Larger distances of texts without a picture are more than a language model in 8 bits explains."""
MISSES = 0.1
"""The largest share of questions that the true candidate does not fit."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A candidate, and its mean distance from the server's log-probabilities; without those, the share of answers that
    differ."""

    exit_layer: int
    fault: str
    distance: float


@dataclass(frozen=True, kw_only=True)
class WhichExit:
    """What a server runs.

    Args:
        verdict: Whether one candidate is established, all are excluded, or several remain.
        exit_layer: The exit; None if it is none of the reference's, or cannot be told.
        fault: What is wrong with its features; empty if nothing is.
        preparation: How it prepares pictures differently; empty if it does not, None if that cannot be told.
        claimed: The exit that it should run, if one was given.
        candidates: What it may be running: none if all were excluded.
        nearest: The candidate with the smallest distance.
        limit: The largest distance at which a candidate fits; None without log-probabilities.
        deviation: The distance on texts without a picture; None if there were none, or no log-probabilities.
        differing: How many answers, of how many, differ from the audited model's; None if they were not counted.
        requests: Questions asked.
        decided_after: How many of them the verdict on the exit needed; the others are about how pictures are prepared,
            and about how many answers differ.
        error_level: The largest probability of naming an exit other than the one that runs.
        has_logprobs: Whether the server gave log-probabilities.
        remarks: What else was noticed, a sentence each.
    """

    verdict: Literal["established", "excluded", "undecided"]
    exit_layer: int | None
    fault: str
    preparation: str | None
    claimed: int | None
    candidates: tuple[Fit, ...]
    nearest: Fit
    limit: float | None
    deviation: float | None
    differing: tuple[int, int] | None
    requests: int
    decided_after: int
    error_level: float
    has_logprobs: bool
    remarks: tuple[str, ...]

    @property
    def is_as_claimed(self) -> bool:
        """Whether it is the exit claimed, or without a claim any exit, and nothing is wrong with its features."""
        is_clean = self.verdict == "established" and not self.fault
        return is_clean and self.claimed in (None, self.exit_layer)


def which_exit(
    vlm: VLM,
    model: ServedModel,
    *,
    claimed: int | None = None,
    error: float = ERROR,
    max_requests: int = MAX_REQUESTS,
    progress: Progress = lambda done, total, note: None,
) -> WhichExit:
    """Find out which exit of a model a server runs.

    Args:
        vlm: The audited model.
        model: What is served.
        claimed: The exit that it should run.
        error: The largest probability of naming an exit other than the one that runs.
        max_requests: The most questions to ask.
        progress: Called with the number of questions asked.

    Raises:
        ExitLayerError: If the model has no such exit.
        InputError: If the model reads no pictures.
        RunError: If the server does not answer questions with pictures, or its context is too small.
    """
    if claimed is not None:
        check_exit_layer(claimed, vlm.num_layers)
    if vlm.encoder.modality != "image":
        raise InputError("which exit a server runs can be asked of image encoders only; leave --encoder out")
    interview = Interview(model=model, vlm=vlm, max_tokens=MAX_NEW_TOKENS)
    return identify(
        vlm, interview, Questions(vlm), claimed=claimed, error=error, max_requests=max_requests, progress=progress
    )


def identify(
    vlm: VLM,
    served: Interview,
    questions: Questions,
    *,
    claimed: int | None,
    error: float,
    max_requests: int,
    progress: Progress,
) -> WhichExit:
    """`which_exit` by an interview with chosen questions."""
    inquiry = _Inquiry(vlm, served, questions, error=error, max_requests=max_requests, progress=progress)
    inquiry.ask_texts()
    found = inquiry.settle(candidates_of(vlm), inquiry.questions.picture_question, most=max_requests - NUM_ODD)
    decided_after = served.num_requests
    (exit_layer,) = exits if len(exits := {each.exit_layer for each in found.open}) == 1 else (None,)
    named = found.open[0] if found.is_established else None
    preparation = inquiry.preparation(named) if named is not None and served.has_logprobs else None
    read = vlm.default_exit if claimed is not None and vlm.reads_default(claimed) else claimed
    baseline = read if read is not None else (exit_layer or None)
    is_clean = named is not None and not named.fault and read in (None, named.exit_layer)
    differing = None if is_clean or baseline is None else inquiry.count_differing(Candidate(baseline))
    return WhichExit(
        verdict="established" if named is not None else "undecided" if found.open else "excluded",
        exit_layer=exit_layer,
        fault=named.fault if named is not None else "",
        preparation=preparation,
        claimed=read,
        candidates=tuple(found.fit(each) for each in found.open),
        nearest=found.fit(found.nearest),
        limit=inquiry.limit if served.has_logprobs else None,
        deviation=inquiry.deviation,
        differing=differing,
        requests=served.num_requests,
        decided_after=decided_after,
        error_level=error,
        has_logprobs=bool(served.has_logprobs),
        remarks=tuple(inquiry.remarks),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Which candidates remain, and the distance of every one while it did."""

    open: tuple[Candidate, ...]
    is_established: bool
    distances: dict[Candidate, float]

    @property
    def nearest(self) -> Candidate:
        return min(self.open or self.distances, key=lambda each: (self.distances[each], each))

    def fit(self, candidate: Candidate) -> Fit:
        distance = round(self.distances[candidate], 4)
        return Fit(exit_layer=candidate.exit_layer, fault=candidate.fault, distance=distance)


class _Inquiry:
    """The questions asked of one server."""

    def __init__(
        self,
        vlm: VLM,
        served: Interview,
        questions: Questions,
        *,
        error: float,
        max_requests: int,
        progress: Progress,
    ) -> None:
        self.vlm, self.served, self.questions = vlm, served, questions
        self.error, self.max_requests = error, max_requests
        self.reference = Reference(vlm, max_new_tokens=MAX_NEW_TOKENS)
        self.shared: list[float] = []  # distances of texts without a picture
        self.samples: dict[str, Sample] = {}
        self.answers: dict[str, Answer] = {}
        self.remarks: list[str] = []
        self._progress = progress

    @property
    def deviation(self) -> float | None:
        return round(float(np.mean(self.shared)), 4) if self.shared else None

    @property
    def limit(self) -> float:
        """The largest distance at which a candidate fits a question."""
        least, factor, most = FIT
        return most if not self.shared else round(min(most, max(least, factor * float(np.mean(self.shared)))), 4)

    @property
    def num_left(self) -> int:
        return self.max_requests - self.served.num_requests

    def ask(self, samples: Sequence[Sample]) -> list[Answer]:
        """The server's answers, each asked for once."""
        new = [sample for sample in samples if sample.id not in self.answers]
        found = self.served.ask(new) if new else []
        self.samples |= {sample.id: sample for sample in new}
        self.answers |= {sample.id: answer for sample, answer in zip(new, found, strict=True)}
        self._progress(self.served.num_requests, self.max_requests, "")
        return [self.answers[sample.id] for sample in samples]

    def ask_texts(self) -> None:
        """Steps 1 and 2; a model that insists on a picture skips the second."""
        texts = [self.questions.text_question(number) for number in range(min(NUM_TEXTS, len(self.questions.texts)))]
        try:
            self.vlm.encode_prompt(texts[0])
        except InputError:
            texts = []
        picture = self.questions.picture_question(0)
        self.remarks += self.served.remarks([picture, *texts[:1]])
        self.ask([*texts[:1], picture])  # a server may give log-probabilities without a picture only
        for sample in texts[:1]:
            self._compare_lengths(sample, "without a picture")
        texts = texts if self.served.has_logprobs else []
        for sample, answer in zip(texts, self.ask(texts), strict=True):
            if not answer.text and not answer.top:  # an end at once, whose probability the server does not tell
                continue
            self.shared += self._distances(sample, [Candidate(self.vlm.default_exit)], answer).tolist()
        if (self.deviation or 0) > LARGE_DEVIATION:
            self.remarks.append(
                f"Even without a picture its log-probabilities differ by {self.deviation:.2f}, more than a language "
                "model in 8 bits explains: it has fewer bits or other weights."
            )

    def settle(self, candidates: Sequence[Candidate], question: Callable[[int], Sample], *, most: int) -> _Found:
        """Ask chosen questions until one candidate is established, all are excluded, or no question tells the rest
        apart."""
        every = len(candidates)
        is_open = np.ones(every, dtype=bool)
        studies = Studies(self.reference, candidates, question, has_logprobs=bool(self.served.has_logprobs))
        rows: list[_Row] = []
        fits, leader = np.zeros(every), None
        while self.served.num_requests < most and is_open.any():
            is_fit = fits >= bound(self.error / 2)
            if is_open.sum() == 1 and is_fit[is_open].all():
                break
            number = studies.best(np.flatnonzero(is_open), leader)
            if number is None:
                break
            sample = question(number)
            (answer,) = self.ask([sample])
            if not rows:
                self._compare_lengths(sample, "with a picture")
            if self.served.has_logprobs and not answer.text and not answer.top:
                continue
            rows.append(self._row(studies, number, sample, answer, np.flatnonzero(is_open)))
            ratios, fits = self._weigh(rows, np.flatnonzero(is_open), every)
            is_open &= (ratios < bound(self.error / 2, every)) & (fits > -bound(self.error / 2))
            leader = int(np.where(is_open, ratios, np.inf).argmin()) if is_open.any() else None
        kept = np.flatnonzero(is_open)
        distances = np.array([row.distances for row in rows]).reshape(len(rows), every)
        known = ~np.isnan(distances)
        means = np.where(known, distances, 0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
        return _Found(
            open=tuple(candidates[int(index)] for index in kept),
            is_established=len(kept) == 1 and bool(fits[kept[0]] >= bound(self.error / 2)),
            distances=dict(zip(candidates, means.tolist(), strict=True)),
        )

    def preparation(self, named: Candidate) -> str | None:
        """Step 4: how pictures are prepared; empty if as by the reference, None if that cannot be told."""
        ways = preparations_of(self.vlm, named)
        if len(ways) == 1:
            return None
        found = self.settle(ways, self.questions.odd_question, most=self.max_requests)
        if not found.open:
            self.remarks.append(
                "It prepares pictures that are not square differently from the reference, in none of the ways tried."
            )
        return found.open[0].preparation if found.is_established else None

    def count_differing(self, audited: Candidate) -> tuple[int, int] | None:
        """Step 5: of the questions with a square picture, how many answers differ from the audited model's."""
        asked = [sample for sample in self.samples.values() if Questions.is_square(sample)]
        every = (self.questions.picture_question(number) for number in range(self.max_requests))
        samples = asked + [sample for sample in every if sample.id not in self.samples][: self.num_left]
        theirs = [answer.text for answer in self.ask(samples)]
        rows = [self.reference.rows(sample, [audited])[0] for sample in samples]
        ours = [" ".join(text.split()) for text, _ in self.reference.answers(rows)]
        return (sum(one != two for one, two in zip(ours, theirs, strict=True)), len(samples)) if samples else None

    def _row(
        self, studies: Studies, number: int, sample: Sample, answer: Answer, places: npt.NDArray[np.int64]
    ) -> _Row:
        every = len(studies.candidates)
        distances, hits, margins = np.full(every, np.nan), np.zeros(every, dtype=bool), np.zeros(every)
        if self.served.has_logprobs:
            distances[places] = self._distances(sample, [studies.candidates[int(place)] for place in places], answer)
            hits[places] = distances[places] <= self.limit
        else:
            texts, margins = studies.answers[number]
            hits = texts == answer.text
            distances[places] = ~hits[places]
        return _Row(distances=distances, hits=hits, margins=margins)

    def _weigh(
        self, rows: Sequence[_Row], places: npt.NDArray[np.int64], every: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """For every candidate how much the best other one outweighs it, and how well it fits; open ones only."""
        hits, margins = (np.array([getattr(row, name)[places] for row in rows]) for name in ("hits", "margins"))
        if self.served.has_logprobs:
            ratios = distance_ratios([row.distances[places] for row in rows], self.shared)
            misses = np.full((1, *hits.shape), MISSES)
        else:
            ratios, misses = answer_ratios(hits, margins), flip_probability(margins)
        outweighed, fits = np.full(every, np.inf), np.full(every, -np.inf)
        outweighed[places], fits[places] = ratios.max(axis=0), fit_ratios(hits, misses)
        return outweighed, fits

    def _distances(self, sample: Sample, candidates: Sequence[Candidate], answer: Answer) -> npt.NDArray[np.float64]:
        """Mean absolute difference between the server's log-probabilities and each candidate's, on the server's most
        likely tokens along its own answer."""
        if not answer.top:
            return np.full(len(candidates), -LOWEST_LOGPROB)
        rows = self.reference.rows(sample, candidates)
        response = self.reference.readable([*answer.token_ids, self.vlm.pad_token_id])
        theirs = torch.tensor([value for top in answer.top for value in top.values()], dtype=torch.float64)
        found = []
        for logprobs in self.reference.logprobs(rows, [response] * len(rows)):
            ours = [
                logprobs[place, list(ids)].double().logsumexp(0) for place, top in enumerate(answer.top) for ids in top
            ]
            found.append(float((torch.stack(ours).clamp(min=LOWEST_LOGPROB) - theirs).abs().mean()))
        return np.array(found)

    def _compare_lengths(self, sample: Sample, what: str) -> None:
        ours, theirs = len(self.vlm.encode_prompt(sample).input_ids), self.answers[sample.id].num_prompt_tokens
        if theirs is not None and theirs != ours:
            self.remarks.append(f"A prompt {what} has {theirs} tokens on the server, but {ours} in the reference.")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One question's outcome for every candidate; NaN where a candidate was excluded before."""

    distances: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]
    margins: npt.NDArray[np.float64]
