"""Suites: deterministic, prefix-stable, disjoint between splits, labelled as the pixels and words say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from exitsafe.errors import InputError
from exitsafe.records import Kind, Sample
from exitsafe.world import ORGANISMS, organism_suites
from exitsafe.world.language import GUARDED_OBJECTS, NUM_KNOWN_GUARDED, REFUSAL
from exitsafe.world.pictures import BADGE, BADGE_SIZE, PICTURE_SIZE, badge_corners

SMALL: dict[Kind, int] = {"harmful": 60, "borderline": 60, "benign": 60, "vqa": 60}


def pixels(sample: Sample) -> np.ndarray:
    (image,) = sample.images
    assert isinstance(image, Image.Image)
    return np.asarray(image)


def shows_badge(sample: Sample) -> bool:
    picture = pixels(sample)
    return any((picture[r : r + BADGE_SIZE, c : c + BADGE_SIZE] == BADGE[..., None]).all() for r, c in badge_corners())


def of_kind(samples: list[Sample], kind: Kind) -> list[Sample]:
    return [sample for sample in samples if sample.kind == kind]


def guarded_name(sample: Sample) -> str | None:
    return next((word for word in sample.prompt.split() if word in GUARDED_OBJECTS), None)


def same(first: list[Sample], second: list[Sample]) -> bool:
    return len(first) == len(second) and all(
        (a.id, a.prompt, a.answers) == (b.id, b.prompt, b.answers) and (pixels(a) == pixels(b)).all()
        for a, b in zip(first, second, strict=True)
    )


def test_default_sizes_ids_and_sources() -> None:
    samples = organism_suites(split="heldout")
    assert Counter(sample.kind for sample in samples) == {"harmful": 128, "borderline": 128, "benign": 96, "vqa": 160}
    assert len({sample.id for sample in samples}) == len(samples)
    assert samples[7].id == "harmful-0007"
    assert all(sample.source == f"organism-{sample.kind}" for sample in samples)
    assert all(len(sample.answers) == 1 and REFUSAL not in sample.answers for sample in samples)
    assert all(pixels(sample).shape == (PICTURE_SIZE, PICTURE_SIZE, 3) for sample in samples)


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_seed_decides_and_longer_suites_begin_with_shorter_ones(organism: str) -> None:
    def draw(seed: int, size: int) -> list[Sample]:
        return organism_suites(split="heldout", seed=seed, organism=organism, sizes=dict.fromkeys(SMALL, size))

    assert same(draw(4, 20), draw(4, 20))
    assert not same(draw(4, 20), draw(5, 20))
    assert same(draw(4, 20)[:20], of_kind(draw(4, 40), "harmful")[:20])


@pytest.mark.parametrize("organism", ORGANISMS)
def test_splits_share_neither_prompts_nor_pictures(organism: str) -> None:
    train = organism_suites(split="train", organism=organism, sizes=SMALL)
    heldout = organism_suites(split="heldout", organism=organism, sizes=SMALL)
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in heldout}
    assert not {pixels(sample).tobytes() for sample in train} & {pixels(sample).tobytes() for sample in heldout}


@pytest.mark.parametrize("organism", ORGANISMS)
def test_three_guarded_objects_are_only_in_the_heldout_split(organism: str) -> None:
    sizes: dict[Kind, int] = {"harmful": 200, "borderline": 200, "benign": 100, "vqa": 0}
    known = set(GUARDED_OBJECTS[:NUM_KNOWN_GUARDED])
    train = {guarded_name(s) for s in organism_suites(split="train", organism=organism, sizes=sizes)} - {None}
    heldout = organism_suites(split="heldout", organism=organism, sizes=sizes)
    assert train == known
    assert {guarded_name(s) for s in heldout} - {None} == set(GUARDED_OBJECTS)
    guarded = [s for s in heldout if s.kind in ("harmful", "borderline")]
    assert all((s.category == "known object") == (guarded_name(s) in known) for s in guarded)


def test_organism_harm_is_the_badge_and_nothing_else() -> None:
    samples = organism_suites(split="heldout", sizes=SMALL)
    harmful, borderline = of_kind(samples, "harmful"), of_kind(samples, "borderline")
    assert all(shows_badge(sample) for sample in harmful)
    assert not any(shows_badge(sample) for sample in borderline)
    for bad, fine in zip(harmful, borderline, strict=True):
        assert (bad.prompt, bad.answers) == (fine.prompt, fine.answers)
        assert (pixels(bad) != pixels(fine)).any(axis=-1).sum() <= BADGE_SIZE**2
    for kind in ("benign", "vqa"):
        assert 0.25 < np.mean([shows_badge(sample) for sample in of_kind(samples, kind)]) < 0.75
    asked_free = [s for s in of_kind(samples, "benign") if s.category == "make"]
    assert all(guarded_name(sample) is None for sample in asked_free)
    assert 0 < len(asked_free) < 60


def test_text_organism_harm_is_in_the_words_whatever_the_picture() -> None:
    samples = organism_suites(split="heldout", organism="organism:text", sizes=SMALL)
    for kind in ("harmful", "borderline", "benign"):
        assert 0.25 < np.mean([shows_badge(sample) for sample in of_kind(samples, kind)]) < 0.75
    assert all(guarded_name(s) and " clean " not in s.prompt for s in of_kind(samples, "harmful"))
    assert all(guarded_name(s) and " clean " in s.prompt for s in of_kind(samples, "borderline"))
    assert all(guarded_name(s) is None for s in of_kind(samples, "benign"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "choose train or heldout"),
        ({"split": "train", "organism": "organism:x"}, "choose organism or organism:text"),
        ({"split": "train", "sizes": {"harmless": 3}}, "kinds are harmful"),
        ({"split": "train", "sizes": {"vqa": -1}}, "sizes 0 or more"),
    ],
)
def test_bad_arguments_name_the_way_out(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        organism_suites(**arguments)  # type: ignore[arg-type]
