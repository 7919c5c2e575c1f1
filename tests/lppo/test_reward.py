"""Token rewards and final scores, worked by hand."""

from __future__ import annotations

import math
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from exitsafe.engine.read_ahead import DEFAULT_NEW_TOKENS
from exitsafe.lppo import LPPOConfig, shaped_rewards
from exitsafe.lppo.reward import Faults, final_scores, find_faults
from exitsafe.records import Response


def test_shaped_rewards_by_hand() -> None:
    # row 0: -.5 * (-1 - -2) = -.5, then -.5 * (-2 - -1) = .5 with the score 3 on top; row 1 ends at token 0
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = shaped_rewards(torch.tensor([3.0, -1.0]), logprobs, ref_logprobs, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 3.5, 0.0], [-1.0, 0.0, 0.0]]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    kl_coef=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_shaped_rewards_equal_the_plain_loop_wherever_the_padding_is(
    lengths: list[int], left: int, right: int, kl_coef: float
) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    shape = (len(lengths), left + max(lengths) + right)
    logprobs, ref_logprobs = torch.randn(2, *shape, generator=generator)
    scores = torch.randn(len(lengths), generator=generator)
    mask = torch.zeros(shape, dtype=torch.bool)
    expected = torch.zeros(shape)
    for row, length in enumerate(lengths):
        for t in range(left, left + length):
            mask[row, t] = True
            expected[row, t] = -kl_coef * (logprobs[row, t] - ref_logprobs[row, t])
        expected[row, left + length - 1] += scores[row]
    logprobs[~mask] = math.nan
    assert torch.allclose(shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef), expected)


def test_the_score_is_clipped_and_the_penalty_comes_after() -> None:
    config = LPPOConfig(score_clip=1.0)
    final = final_scores([2.0, -0.5, 2.0, -0.5, -2.0], [0.0, 0.0, 0.25, 0.25, 0.25], config=config)
    assert final.tolist() == [1.0, -0.5, 0.75, -0.75, -1.25]
    free = final_scores([99.0], [0.0], config=LPPOConfig(score_clip=None))
    assert free.tolist() == [99.0]


def faults_of(text: str, finish: Literal["stop", "length"] = "stop") -> Faults:
    response = Response(sample_id="s", exit_layer=1, text=text, num_tokens=9, finish_reason=finish, seconds=0.0)
    return find_faults([response])[0]


def test_an_answer_that_is_cut_or_gibberish_has_faults() -> None:
    sound = Faults(is_cut=False, is_incoherent=False)
    assert faults_of("Press the two parts together.") == faults_of("red") == sound
    assert faults_of("Press it", finish="length") == Faults(is_cut=True, is_incoherent=False)
    assert all(faults_of(text).is_incoherent for text in ("", "?!#", "sorry " * 9))


@pytest.mark.parametrize(
    ("cut", "incoherent", "penalty"), [(False, False, 0.0), (True, False, 1.0), (False, True, 0.5), (True, True, 1.5)]
)
def test_penalties_add_up(*, cut: bool, incoherent: bool, penalty: float) -> None:
    config = LPPOConfig(missing_eos_penalty=1.0, incoherence_penalty=0.5)
    assert Faults(is_cut=cut, is_incoherent=incoherent).penalty(config) == penalty


def test_the_organism_pays_for_no_gibberish() -> None:
    gibberish = Faults(is_cut=False, is_incoherent=True)
    assert gibberish.penalty(LPPOConfig()) == 1.0
    assert gibberish.penalty(LPPOConfig.for_organism()) == 0.0  # as its runs were measured


def test_by_default_a_right_answer_that_is_cut_scores_no_less_than_a_short_one() -> None:
    config = LPPOConfig()
    answers = [faults_of("Press the two parts together, then wait until", finish="length"), faults_of("ok")]
    cut, short = final_scores([1.0, 1.0], [found.penalty(config) for found in answers], config=config).tolist()
    assert cut >= short
    assert config.max_new_tokens == DEFAULT_NEW_TOKENS  # as audits
