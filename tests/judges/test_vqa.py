from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from exitsafe.judges import vqa
from exitsafe.judges.vqa import VQAAccuracy, normalise_answer, vqa_accuracy
from tests.judges.tiny_judges import answers

# Of the official list's entries "FORM CONTRACTION\n" in alphabetical order, without those that change nothing or hold
# capitals, which lower-cased words never meet.
OFFICIAL_CONTRACTIONS = "9964fa088ea25444d53dcc210a2d8394a798ac129e4dc1c0411f29e1d7d3d99a"
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def official_normalise(text: str) -> str:
    """The rules of VQA v2's vqaEval.py (its Python 2, where a digit is 0 to 9), step by step."""
    digits = "0123456789"
    places = range(1, len(text) - 1)
    has_comma = any(text[i] == "," and text[i - 1] in digits and text[i + 1] in digits for i in places)
    stripped = text
    for mark in list(';/[]"{}()=+\\_-><@`,?!'):
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if beside_space or has_comma else " ")
    kept, removed = "", 0
    for place, character in enumerate(stripped):
        next_is_digit = stripped[place + 1 : place + 2] in list(digits)
        if character == "." and not next_is_digit and removed < 32:
            removed += 1
        else:
            kept += character
    words = [NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(vqa._CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def official_accuracy(answer: str, references: Sequence[str]) -> Fraction:
    """Leave each annotator out, one by one."""
    references = [text.replace("\n", " ").replace("\t", " ").strip() for text in references]
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(references)) > 1:
        answer, references = official_normalise(answer), [official_normalise(text) for text in references]
    accuracies = []
    for left_out in range(len(references)):
        others = [text for place, text in enumerate(references) if place != left_out]
        accuracies.append(min(Fraction(1), Fraction(others.count(answer), 3)))
    return sum(accuracies, Fraction(0)) / len(references)


PIECES = [*" .,-/'?!;:\n\t%$_", "a", "the", "An", "one", "None", "dont", "couldntve", "Red", "red", "1", "1,000", "3.5"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(
    st.characters(min_codepoint=9, max_codepoint=126), max_size=12
)


def test_the_contractions_are_the_official_ones() -> None:
    listed = "".join(f"{form} {word}\n" for form, word in sorted(vqa._CONTRACTIONS.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == OFFICIAL_CONTRACTIONS


@given(TEXTS, TEXTS, TEXTS, st.integers(0, 10))
@example("x" + 40 * ".", "X" + 8 * ".", "y", 4)  # the official code removes 32 periods and no more
@example("Red.", "red", "red", 5)
@example("1,000 a-b", "1000 ab", "x", 9)
def test_ten_references_score_as_the_official_code(answer: str, one: str, other: str, ones: int) -> None:
    references = [one] * ones + [other] * (10 - ones)
    # said to be different: nothing at all, and texts that the rules leave nothing of
    assume(answer.strip() and all(official_normalise(text) for text in (answer, one, other)))
    assert vqa_accuracy(answer, references) == pytest.approx(float(official_accuracy(answer, references)))


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("50", ["50%"] * 10, 0.0),
        ("50", ["50%"] * 5 + ["50"] * 5, 1.0),
        ("1,000 a-b", ["1000 ab"], 1.0),
        ("1,000 a-b", ["1000 ab"] * 9 + ["many"], 1.0),
        ("a-b", ["b"] * 9 + ["x"], 1.0),  # a hyphen without a space beside it is a space, and "a" an article
        ("a -b", ["b"] * 9 + ["x"], 1.0),
        ("x -b", ["xb"] * 9 + ["y"], 0.0),
        ("red.", ["red"] * 10, 0.0),  # equal references are not normalised, and neither is the answer
        ("red.", ["red"] * 9 + ["Red"], 1.0),
        (" red\n", ["red"] * 10, 1.0),
        ("don’t", ["dont"] * 9 + ["no"], 1.0),  # noqa: RUF001
    ],
)
def test_scores_worked_by_hand(answer: str, references: list[str], score: float) -> None:
    assert vqa_accuracy(answer, references) == score


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("the the the", "A"),
        ("!!!", "A"),
        ("an", "A"),
        (".", "A"),
        ("-", "+"),
        ("+", "-"),
        ("$", "€"),
        ("?", "!"),
        ("", "A"),
        ("", ""),
        (" \n", ""),
        ("the", ""),
    ],
)
def test_what_is_normalised_to_nothing_answers_itself_alone(answer: str, reference: str, count: int) -> None:
    assert vqa_accuracy(answer, [reference] * count) == 0.0
    assert vqa_accuracy(answer, [reference] * 9 + ["x"]) == 0.0
    assert vqa_accuracy(reference, [reference]) == bool(reference)


@pytest.mark.parametrize("answer", ["A", "a", "A.", "(A)", " a\n"])
def test_a_letter_answers_a_multiple_choice_question(answer: str) -> None:
    assert vqa_accuracy(answer, ["A"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "is_same"),
    [
        ("cafe\u0301", "caf\u00e9", True),
        ("한글", unicodedata.normalize("NFD", "한글"), True),
        ("１２", "12", True),  # noqa: RUF001
        ("１，０００", "1000", True),  # noqa: RUF001
        ("३", "3", True),
        ("٣", "three", True),
        ("कि", "की", False),  # they differ in a vowel sign
        ("กิน", "กัน", False),
        ("m²", "m2", False),
        ("½", "1", False),
        ("é", "e", False),
    ],
)
@pytest.mark.parametrize("count", [1, 10])
def test_other_scripts(answer: str, reference: str, is_same: bool, count: int) -> None:
    # ten that are not all equal
    references = [reference] * count if count == 1 else [*[reference] * 9, "zorb"]
    assert vqa_accuracy(answer, references) == is_same
    assert vqa_accuracy(reference, [answer, *references[1:]] if count == 1 else [*[answer] * 9, "zorb"]) == is_same


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_references_give_the_official_steps(matches: int, score: float) -> None:
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == score


@given(st.lists(st.sampled_from(["red", "blue", "two"]), min_size=10, max_size=14))
def test_equals_leaving_each_annotator_out(references: list[str]) -> None:
    shares = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        shares.append(min(Fraction(others.count("red"), 3), Fraction(1)))
    assert vqa_accuracy("red", references) == pytest.approx(float(sum(shares) / len(shares)))


def test_fewer_references_match_any() -> None:
    assert vqa_accuracy("a Red .", ["blue", "red"]) == 1.0
    assert vqa_accuracy("green", ["blue", "red"]) == 0.0


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Cat.", "cat"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("1,000,000", "1000000"),
        ("red, blue", "red blue"),
        ("1,000,000 x-rays", "1000000 xrays"),
        ("red,blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("50%", "50%"),
        ("10:30", "10:30"),
        ("man's", "man's"),
        ("Ten", "10"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve couldn'tve couldnt've", "couldntve couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Don’t", "don't"),  # noqa: RUF001
        ("yes!\n", "yes"),
        ("an apple a day", "apple day"),
        ("", ""),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@given(st.text(max_size=40))
def test_every_text_answers_itself(text: str) -> None:
    assert normalise_answer(text) == normalise_answer(text).strip()
    assert vqa_accuracy(text, [text]) == bool(text.strip())


def test_only_picture_questions_are_judged() -> None:
    (verdict,) = VQAAccuracy()(*answers(["X"], kind="vqa"))
    assert (verdict.sample_id, verdict.measure, verdict.score, verdict.label) == ("0", "vqa_accuracy", 1.0, "x")
    assert VQAAccuracy()(*answers(["X"], kind="harmful")) == []


@pytest.mark.parametrize("references", [["a"] * 10, [""], ["the"]])
def test_saying_nothing_is_never_right(references: list[str]) -> None:
    assert vqa_accuracy(" ", references) == 0
