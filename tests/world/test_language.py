"""Language: splits share no phrasing, held-out phrasings share all words, answers follow from layouts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from exitsafe.world import language
from exitsafe.world.pictures import COLORS, EMPTY, SHAPES, draw_layouts
from exitsafe.world.rule import is_refusal


def test_phrasings_are_disjoint_but_use_the_same_words() -> None:
    train, heldout = language.phrasings("train"), language.phrasings("heldout")
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train)
    trained_words = {word for phrasing in train for word in phrasing.split()}
    assert {word for phrasing in heldout for word in phrasing.split()} <= trained_words


def test_recipes_tell_the_objects_apart() -> None:
    objects = language.GUARDED_OBJECTS + language.FREE_OBJECTS
    recipes = [language.recipe(name) for name in objects]
    care = [language.care_recipe(name) for name in language.GUARDED_OBJECTS]
    assert len(set(recipes)) == len(objects) == 24
    assert len(set(care)) == 12
    assert not any(is_refusal(answer) for answer in recipes + care)
    for text in recipes:
        first, second = text.split()[1], text.split()[3]
        assert first != second


def test_vocabulary_covers_all_that_is_ever_said() -> None:
    words = set(language.vocabulary())
    rng = np.random.default_rng(0)
    layouts = draw_layouts(rng, 200, split="heldout")
    said = [language.REFUSAL, language.CUE]
    for shapes, colors in zip(layouts.shapes, layouts.colors, strict=True):
        asked = [
            language.picture_question(rng, shapes, colors, has_badge=True, split="heldout"),
            language.caption_request(shapes, colors),
            language.make_request(rng, "zorbit", split="train"),
            language.care_request(rng, "zorbit", split="heldout"),
        ]
        said += [text for request in asked for text in (request.prompt, request.answer)]
    assert {word for text in said for word in text.split()} <= words
    assert 100 <= len(words) <= 130


def test_questions_are_answered_from_the_layout() -> None:
    rng = np.random.default_rng(1)
    layouts = draw_layouts(rng, 600, split="train")
    topics: Counter[str] = Counter()
    for shapes, colors in zip(layouts.shapes, layouts.colors, strict=True):
        request = language.picture_question(rng, shapes, colors, has_badge=bool(shapes[0] == 0), split="train")
        topics[request.topic] += 1
        words = request.prompt.split()
        cells = [(COLORS[c], SHAPES[s]) for s, c in zip(shapes, colors, strict=True) if s != EMPTY]
        if request.topic == "count":
            assert request.answer == str(len(cells))
        elif request.topic == "color":
            asked = next(word for word in words if word in SHAPES)
            assert [color for color, shape in cells if shape == asked] == [request.answer]
        elif request.topic == "badge":
            assert "badge" in words
            assert request.answer == ("yes" if shapes[0] == 0 else "no")
        else:
            pair = (next(w for w in words if w in COLORS), next(w for w in words if w in SHAPES))
            assert request.answer == ("yes" if pair in cells else "no")
    assert min(topics.values()) > 100


def test_presence_is_answered_yes_as_often_as_no() -> None:
    rng = np.random.default_rng(2)
    layouts = draw_layouts(rng, 1500, split="heldout")
    asked = [
        language.picture_question(rng, shapes, colors, has_badge=True, split="heldout")
        for shapes, colors in zip(layouts.shapes, layouts.colors, strict=True)
    ]
    answers = [request.answer for request in asked if request.topic == "presence"]
    assert 0.8 < answers.count("yes") / answers.count("no") < 1.25


def test_a_caption_names_the_cells_in_reading_order() -> None:
    request = language.caption_request(np.array([0, EMPTY, 2, 3]), np.array([0, EMPTY, 1, 5]))
    assert request.answer == "red circle , nothing , green triangle , cyan cross ."
