"""Exports in a real vLLM, which reads the pictures itself: the greedy answers of the exit, and of no other."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

import exitsafe
from exitsafe.records import Sample
from exitsafe.world.suites import organism_suites
from tests.engines.served_models import served_model
from tests.engines.server import ask
from tests.engines.vllm_server import NAME, vllm_server
from tests.tiny_models import WORDS, noise_image

pytestmark = pytest.mark.engines
NUM_QUESTIONS, NUM_TOKENS = 24, 8
_A_TIE = 1e-3  # difference of log-probabilities that another order of sums can turn


@pytest.mark.parametrize(
    ("kind", "exit_layer", "another"), [("organism", 3, 7), ("llava-siglip", 3, 2), ("qwen2_5_vl", 3, 2)]
)
def test_vllm_answers_as_the_exit_does(kind: str, exit_layer: int, another: int, tmp_path: Path) -> None:
    vlm = served_model(kind)
    slim = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim")
    samples = _questions(kind)
    with vllm_server(slim, log=tmp_path / "vllm.log", mm_embeds=False) as url:
        special = set(vlm.processor.tokenizer.all_special_tokens)
        served = [_answer(url, sample, without=special) for sample in samples]
    ours, theirs = (
        [response.text.split() for response in vlm.generate(samples, layer, max_new_tokens=NUM_TOKENS)]
        for layer in (exit_layer, another)
    )
    gaps = [_gap_where_they_part(words, *answer) for words, answer in zip(ours, served, strict=True)]
    parted = [gap for gap in gaps if gap is not None]
    print(f"{kind}: {len(gaps) - len(parted)} of {len(gaps)} answers equal; gaps where they part: {parted}")
    assert all(gap < _A_TIE for gap in parted)
    assert sum(words != tokens for words, (tokens, _) in zip(theirs, served, strict=True)) > NUM_QUESTIONS // 4


def _questions(kind: str) -> list[Sample]:
    if kind == "organism":
        asked = [sample for sample in organism_suites(split="heldout", seed=5) if sample.images]
        return asked[:: len(asked) // NUM_QUESTIONS][:NUM_QUESTIONS]
    words, size = np.random.default_rng(0), (32, 32) if kind == "qwen2_5_vl" else (28, 28)
    return [
        Sample(
            id=f"q{number}",
            prompt=" ".join(words.choice(WORDS, 5)),
            images=(noise_image(number, size),),
            kind="benign",
        )
        for number in range(NUM_QUESTIONS)
    ]


def _answer(url: str, sample: Sample, *, without: Collection[str]) -> tuple[list[str], list[float]]:
    """The words of a greedy answer, and at each how far the second best was behind."""
    choice = ask(url, sample, model=NAME, max_tokens=NUM_TOKENS, top_logprobs=2)
    words, gaps = [], []
    for token in choice["logprobs"]["content"]:  # with the word that ended the answer, which the text is without
        if (word := token["token"].strip()) not in without:
            first, second = (each["logprob"] for each in token["top_logprobs"])
            words.append(word)
            gaps.append(first - second)
    return words, gaps


def _gap_where_they_part(ours: list[str], served: list[str], gaps: list[float]) -> float | None:
    """How far the second best token was behind where two answers differ first; None if they are equal."""
    if ours == served:
        return None
    place = next((n for n, (a, b) in enumerate(zip(ours, served, strict=False)) if a != b), min(len(ours), len(served)))
    return gaps[min(place, len(gaps) - 1)]
