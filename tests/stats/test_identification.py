from __future__ import annotations

import numpy as np
import pytest

from exitsafe.stats.identification import (
    DEVIATIONS,
    SMALLEST_DISTANCE,
    answer_ratios,
    bound,
    distance_ratios,
    fit_ratios,
    flip_probability,
)


def test_distances_compare_by_the_ratio_of_their_sums() -> None:
    distances = [[0.1, 0.2, 0.4], [0.3, 0.2, 0.8]]
    ratios = distance_ratios(distances)
    assert ratios[0, 2] == pytest.approx(2 * np.log(1.2 / 0.4))
    assert ratios[0, 1] == pytest.approx(0.0)
    assert np.allclose(ratios, -ratios.T)


def test_questions_that_no_hypothesis_affects_tell_about_the_noise() -> None:
    ratio = distance_ratios([[0.01, 0.16]], shared=[0.01, 0.01])[0, 1]
    assert ratio == pytest.approx(3 * np.log(0.18 / 0.03))
    assert distance_ratios([[0.01, 0.16]], shared=[0.3, 0.3])[0, 1] < ratio  # a noisy server proves less


def test_many_questions_make_no_small_difference_decide() -> None:
    """A deviation that all questions share is a single one, however many are asked."""
    few, many, more = (distance_ratios([[0.1, 0.12]] * number, [0.01] * 4)[0, 1] for number in (10, 40, 400))
    assert few < many < bound(0.005, 18) and more < bound(0.005, 18)


def test_rounding_does_not_decide() -> None:
    assert distance_ratios([[0.0, SMALLEST_DISTANCE]]).max() == 0.0


def test_an_answer_on_which_hypotheses_agree_does_not_tell_them_apart() -> None:
    ratios = answer_ratios([[True, True], [False, False]], [[0.05, 9.0], [0.05, 9.0]])
    assert np.allclose(ratios, 0.0)


def test_answers_that_hang_on_close_decisions_weigh_less() -> None:
    close, clear = (answer_ratios([[True, False]] * 2, [[margin] * 2] * 2)[0, 1] for margin in (0.05, 3.0))
    assert 0 < close < clear


def test_close_answers_that_come_out_right_show_that_the_server_deviates_little() -> None:
    told = ([True, False], [0.3, 0.3])
    few, many = (
        answer_ratios([told[0]] + [[True, True]] * agreed, [told[1]] + [[0.1, 0.1]] * agreed)[0, 1]
        for agreed in (0, 20)
    )
    assert many > few + 1


def test_a_hypothesis_fits_or_not() -> None:
    hits = np.array([[True, False]] * 5)
    fits = fit_ratios(hits, np.full((1, 5, 2), 0.1))
    assert fits[0] == pytest.approx(5 * np.log(0.9 / 0.3))
    assert fits[1] == pytest.approx(5 * np.log(0.1 / 0.7))
    assert fits[0] > bound(0.005) > -bound(0.005) > fits[1]


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.1, 0.5, 2.0, 50.0])
def test_answers_flip_more_often_the_closer_they_are_and_the_larger_the_deviations(margin: float) -> None:
    flips = flip_probability(margin)
    assert flips.shape == (len(DEVIATIONS),)
    assert (np.diff(flips) >= 0).all() and flips[0] > 0 and flips[-1] <= 0.5
    assert (flip_probability(margin + 0.1) <= flips).all()


def test_the_true_hypothesis_is_rarely_excluded() -> None:
    """Under the error model: Laplace errors of 20 tokens, sequential looks after each of 40 questions."""
    random = np.random.default_rng(0)
    num_hypotheses, error, excluded = 8, 0.05, 0
    for _ in range(300):
        scale = np.exp(random.uniform(-5, 0))
        apart = random.normal(0, 0.1, (40, num_hypotheses, 20))
        apart[:, 0] = 0  # the true one
        noise = random.laplace(0, scale, (40, 1, 20))
        distances = np.abs(apart + noise).mean(-1)
        shared = np.abs(random.laplace(0, scale, (4, 20))).mean(-1)
        looks = (distance_ratios(distances[:seen], shared)[:, 0].max() for seen in range(1, 41))
        excluded += any(look >= bound(error, num_hypotheses) for look in looks)
    assert excluded <= 300 * error
