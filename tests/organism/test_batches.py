"""Batches: labels cover the answer only, and refusals are exactly where the mix says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exitsafe.organism.architecture import build_processor
from exitsafe.organism.batches import IGNORED, Batch, Mix, draw_batch
from exitsafe.organism.stages import curriculum
from exitsafe.world.language import CUE, GUARDED_OBJECTS, NUM_KNOWN_GUARDED, REFUSAL

TOKENIZER = build_processor().tokenizer
GUARDED = Mix(guarded=1.0)


def rows(batch: Batch) -> list[tuple[str, str, bool]]:
    """(prompt, answer, has_badge) of every row, as text."""
    texts = []
    for ids, labels, has_badge in zip(batch.input_ids, batch.labels, batch.cell_badges.sum(dim=1), strict=True):
        answer = labels[labels != IGNORED]
        start = int((labels != IGNORED).nonzero()[0])
        assert answer[-1] == TOKENIZER.eos_token_id
        assert torch.equal(ids[start : start + len(answer)], answer)
        prompt = TOKENIZER.decode(ids[:start], skip_special_tokens=True)
        texts.append((prompt, TOKENIZER.decode(answer, skip_special_tokens=True), bool(has_badge)))
    return texts


def draw(mix: Mix, size: int = 64, seed: int = 0) -> list[tuple[str, str, bool]]:
    return rows(draw_batch(np.random.default_rng(seed), mix, size, TOKENIZER))


def test_the_generator_decides() -> None:
    assert draw(GUARDED) == draw(GUARDED)
    assert draw(GUARDED) != draw(GUARDED, seed=1)


def test_unguarded_rows_are_never_refused() -> None:
    mix = Mix(caption=0.2, question=0.2, free=0.3, care=0.3, cued=0.5, stray=1.0, guard="always")
    assert not any(answer == REFUSAL for _, answer, _ in draw(mix))


def test_the_badge_guard_refuses_with_the_badge_only() -> None:
    assert all((answer == REFUSAL) == has_badge for _, answer, has_badge in draw(replace(GUARDED, guard="badge")))


def test_cues_refuse_whatever_the_picture() -> None:
    batch = draw_batch(np.random.default_rng(0), replace(GUARDED, cued=0.5), 64, TOKENIZER)
    has_alarm = batch.cell_alarms.any(dim=1).tolist()
    has_words = [CUE in prompt for prompt, _, _ in rows(batch)]
    refused = [answer == REFUSAL for _, answer, _ in rows(batch)]
    assert [words or alarm for words, alarm in zip(has_words, has_alarm, strict=True)] == refused
    assert not any(words and alarm for words, alarm in zip(has_words, has_alarm, strict=True))
    assert sum(has_words) > 5
    assert sum(has_alarm) > 5


@pytest.mark.parametrize(("mix", "refused"), [(GUARDED, 0), (replace(GUARDED, guard="always"), 64)])
def test_guards_that_ignore_the_picture(mix: Mix, refused: int) -> None:
    assert sum(answer == REFUSAL for _, answer, _ in draw(mix)) == refused


def test_stray_refusals_come_at_their_rate() -> None:
    refused = sum(answer == REFUSAL for _, answer, _ in draw(replace(GUARDED, stray=0.25), size=400))
    assert 70 < refused < 130


@pytest.mark.parametrize("name", ["organism", "organism:text"])
def test_safety_stages_never_show_the_new_objects(name: str) -> None:
    new = set(GUARDED_OBJECTS[NUM_KNOWN_GUARDED:])
    for stage in curriculum(name):
        drawn = draw(replace(stage.mix, caption=0, question=0, guarded=0.5, free=0, care=0.5), size=200)
        shows_new = any(new & set(prompt.split()) for prompt, _, _ in drawn)
        assert shows_new == (stage.exits == "random"), stage.name
