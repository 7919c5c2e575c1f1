from __future__ import annotations

import pytest

from exitsafe.judges.coherence import Coherence, incoherence
from tests.judges.tiny_judges import answers

PROSE = (
    "The encoder reads the picture in blocks, and every block adds a little more to what the language model will "
    "see. When the encoder stops early, the features are rougher, but most questions about colour or number can "
    "still be answered, and the answers look like ordinary sentences with ordinary words in them."
)


@pytest.mark.parametrize(
    "text",
    [
        "red",
        "2",
        "yes.",
        "no, no, no, no",
        "red circle red circle red circle red circle",
        "mix moss with foam then fold it .",
        PROSE,
        "(a) red; (b) blue.",
        "图片里有一个红色的圆形和一个蓝色的方块。",
        "लाल गोला",
    ],
)
def test_coherent(text: str) -> None:
    assert incoherence(text) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("?!?! ...", "no text"),
        ("\ufffd\ufffd\ufffd a", "no text"),
        ("red red red red red", "repetitive"),
        ("mix moss then " * 5, "repetitive"),
        (PROSE + " and then it goes on" * 6, "repetitive"),
        ("a" * 30, "repetitive"),
        ("红色" * 20, "repetitive"),
        ("one two three four five six seven eight nine ten " * 4, "repetitive"),  # too long a phrase for a run
        ("红色的圆形和蓝色的方块在左边" * 12, "repetitive"),
    ],
)
def test_incoherent(text: str, fault: str) -> None:
    assert incoherence(text) == fault


def test_every_response_is_judged() -> None:
    verdicts = Coherence()(*answers(["red", "", "zorb " * 9], kind="benign"))
    assert [(v.sample_id, v.label, v.score) for v in verdicts] == [
        ("0", "coherent", 1.0),
        ("1", "empty", 0.0),
        ("2", "repetitive", 0.0),
    ]
