"""Faults of form: which answers have them, and what they cost."""

from __future__ import annotations

from typing import Literal

import pytest

from exitsafe.cli.defaults import MODEL_TOKENS
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.guards import Faults, find_faults
from exitsafe.lppo.reward import final_scores
from exitsafe.records import Kind, Response, Sample


def faults_of(
    text: str, *, num_tokens: int = 9, kind: Kind = "benign", finish: Literal["stop", "length"] = "stop"
) -> Faults:
    sample = Sample(id="s", prompt="p", kind=kind, answers=("red",))
    response = Response(
        sample_id="s", exit_layer=1, text=text, num_tokens=num_tokens, finish_reason=finish, seconds=0.0
    )
    (found,) = find_faults([sample], [response], config=LPPOConfig(min_answer_tokens=4))
    return found


def test_gibberish_and_one_word_answers_have_faults_and_short_answers_about_pictures_have_none() -> None:
    sound = Faults(is_cut=False, is_short=False, is_incoherent=False)
    assert faults_of("Press the two parts together.") == sound
    assert faults_of("Press it.", num_tokens=4) == sound
    assert faults_of("Yes.", num_tokens=3) == Faults(is_cut=False, is_short=True, is_incoherent=False)
    assert faults_of("red", num_tokens=2, kind="vqa") == sound
    assert faults_of("red", num_tokens=2, kind="harmful").is_short
    assert faults_of("Press it", finish="length") == Faults(is_cut=True, is_short=False, is_incoherent=False)
    for text in ("", "?!#", "sorry " * 9):
        assert faults_of(text).is_incoherent, text
    assert faults_of("", kind="vqa").is_incoherent


@pytest.mark.parametrize(
    ("cut", "short", "incoherent", "penalty"),
    [
        (False, False, False, 0.0),
        (True, False, False, 1.0),
        (False, True, False, 0.25),
        (False, False, True, 0.5),
        (True, True, True, 1.75),
    ],
)
def test_penalties_add_up(*, cut: bool, short: bool, incoherent: bool, penalty: float) -> None:
    config = LPPOConfig(missing_eos_penalty=1.0, short_answer_penalty=0.25, incoherence_penalty=0.5)
    assert Faults(is_cut=cut, is_short=short, is_incoherent=incoherent).penalty(config) == penalty


def test_the_organism_pays_for_no_gibberish_and_nobody_for_short_answers_unless_asked() -> None:
    gibberish = Faults(is_cut=False, is_short=False, is_incoherent=True)
    assert gibberish.penalty(LPPOConfig()) == 1.0
    assert gibberish.penalty(LPPOConfig.for_organism()) == 0.0  # as its runs were measured
    assert LPPOConfig().min_answer_tokens == LPPOConfig.for_organism().min_answer_tokens == 0


def test_by_default_a_right_answer_that_is_cut_scores_no_less_than_a_short_one() -> None:
    config = LPPOConfig()
    asked = [Sample(id="s", prompt="p", kind="benign")] * 2
    texts = ["Press the two parts together, then wait until", "ok"]
    said = [
        Response(sample_id="s", exit_layer=1, text=texts[0], num_tokens=9, finish_reason="length", seconds=0.0),
        Response(sample_id="s", exit_layer=1, text=texts[1], num_tokens=2, finish_reason="stop", seconds=0.0),
    ]
    penalties = [found.penalty(config) for found in find_faults(asked, said, config=config)]
    cut, short = final_scores([1.0, 1.0], penalties, config=config).tolist()
    assert cut >= short
    assert config.max_new_tokens == MODEL_TOKENS  # as audits
