"""Constraints: costs, the dual ascent and the penalised score, by hand; what cannot be measured is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exitsafe.errors import InputError, RunError
from exitsafe.lppo.constraints import Constraints, check_constraints, every_pair
from exitsafe.lppo.reward import Score
from exitsafe.records import Kind, Sample
from tests.lppo.conftest import tiny_config

BOTH = {"over_refusal": 0.1, "utility": 0.05}


def constraints(limits: dict[str, float] | None = None, **changes: Any) -> Constraints:
    return Constraints(tiny_config(constraints=BOTH if limits is None else limits, **changes))


def sample(kind: Kind) -> Sample:
    return Sample(id=kind, prompt="p", kind=kind, answers=("a",))


KINDS: list[Kind] = ["harmful", "borderline", "benign", "vqa", "vqa"]
SAMPLES = [sample(kind) for kind in KINDS]
SCORES = [
    Score(value=1.0, refusal=1.0),
    Score(value=-1.0, refusal=1.0),
    Score(value=1.0, refusal=0.0),
    Score(value=0.3, refusal=0.0, vqa_accuracy=0.3),
    Score(value=0.0, refusal=1.0),  # the judge of accuracy did not say
]


def test_costs_are_refusals_of_the_harmless_and_wrong_answers_to_questions() -> None:
    assert constraints().costs(SAMPLES, SCORES) == {
        "over_refusal": [None, 1.0, 0.0, None, None],
        "utility": [None, None, None, pytest.approx(0.7), None],
    }


def test_the_penalised_score_by_hand() -> None:
    limits = constraints()
    scores = torch.tensor([1.0, -1.0, 1.0, 0.3, 0.0])
    costs = limits.costs(SAMPLES, SCORES)
    assert torch.equal(limits.penalised(scores, costs), scores)  # multipliers start at 0: as without constraints
    limits.multipliers = {"over_refusal": 2.0, "utility": 1.0}
    # (score - 2 * over-refusal - 1 * wrong) / (1 + 2 + 1)
    expected = [1 / 4, (-1 - 2) / 4, 1 / 4, (0.3 - 0.7) / 4, 0.0]
    assert limits.penalised(scores, costs).tolist() == pytest.approx(expected)
    limits.multipliers = {"over_refusal": 10.0, "utility": 10.0}
    assert limits.penalised(scores, costs).abs().max() <= 1.0  # the scale of the scores is kept


def test_multipliers_rise_while_violated_fall_to_zero_when_kept_and_stay_in_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exitsafe.lppo.constraints.MAX_MULTIPLIER", 1.5)
    limits = constraints({"over_refusal": 0.1}, constraint_rate=2.0)
    course = []
    for cost in (0.4, 0.4, 0.4, None, 0.0, 0.0, 0.1, *[0.0] * 8):
        limits.ascend({"over_refusal": cost})
        course.append(limits.multipliers["over_refusal"])
    expected = [0.6, 1.2, 1.5, 1.5, 1.3, 1.1, 1.1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0, 0.0, 0.0]
    assert course == pytest.approx(expected)


def test_utility_is_lost_against_the_untrained_model_at_the_same_exits() -> None:
    limits = constraints()
    limits.set_reference([1.0, 0.0, None, 0.0, 0.25, None], [1, 1, 1, 2, 2, 3])
    # exit 3 has no judged answer: the mean of all, 1.25 / 4
    assert limits.reference_errors == {1: 0.5, 2: 0.125, 3: 0.3125}
    costs = {"over_refusal": [None, 1.0, 0.0, None], "utility": [1.0, None, None, 0.0]}
    measured = limits.measure(costs, [1, 1, 2, 2])
    assert measured == {"over_refusal": 0.5, "utility": pytest.approx(((1 - 0.5) + (0 - 0.125)) / 2)}
    assert limits.measure({"over_refusal": [None], "utility": [None]}, [1]) == {"over_refusal": None, "utility": None}
    with pytest.raises(RunError, match="no answer of the untrained model to a picture question could be judged"):
        limits.set_reference([None], [1])


def test_without_constraints_nothing_changes() -> None:
    for given in (tiny_config(), tiny_config(constraints={})):
        limits = Constraints(given)
        scores = torch.tensor([1.0, -1.0, 1.0, 0.3, 0.0])
        costs = limits.costs(SAMPLES, SCORES)
        assert costs == {}
        assert limits.penalised(scores, costs) is scores
        assert limits.measure(costs, [1] * 5) == {}
        assert limits.metrics({}) == {}
        assert not limits.needs_reference


def test_state_carries_over() -> None:
    one, other = constraints(), constraints()
    one.set_reference([1.0, 0.0], [1, 2])
    one.ascend({"over_refusal": 0.9, "utility": 0.9})
    other.load_state(one.state())
    assert (other.multipliers, other.reference_errors) == (one.multipliers, one.reference_errors)
    one.ascend({"over_refusal": 0.9, "utility": 0.9})
    assert other.multipliers != one.multipliers  # a copy
    assert one.metrics({"over_refusal": 0.9, "utility": None}) == {
        "costs": {"over_refusal": 0.9, "utility": None},
        "multipliers": one.multipliers,
    }


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    def check(gives_costs: bool = True, samples: list[Sample] = SAMPLES, **changes: Any) -> None:
        config = tiny_config(constraints=BOTH, **changes)
        check_constraints(config, samples, (1, 2, 3), reward="count_red", gives_costs=gives_costs)

    check()
    with pytest.raises(
        InputError, match="constraints need to know which answers were refusals or correct, and reward count_red"
    ):
        check(gives_costs=False)
    with pytest.raises(
        InputError, match="over_refusal is measured on borderline and benign samples, but none is drawn"
    ):
        check(samples=[sample("harmful"), sample("vqa")])
    with pytest.raises(InputError, match="utility is measured on vqa samples, but none is drawn"):
        check(mix={"harmful": 1.0, "benign": 1.0, "vqa": 0.0})
    with pytest.raises(InputError, match="constraint_samples=2 is fewer than the 3 trained exits"):
        check(constraint_samples=2)
    check_constraints(tiny_config(), SAMPLES, (1, 2), reward="count_red", gives_costs=False)


@pytest.mark.parametrize("num_questions", [1, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("num_exits", [1, 2, 8])
def test_no_exit_always_meets_the_same_questions(num_questions: int, num_exits: int) -> None:
    whole = num_questions * num_exits
    for num in (whole // 2, whole, whole + 3):
        questions, exits = every_pair(range(num_questions), range(num_exits), num)
        assert len(set(zip(questions, exits, strict=True))) == min(num, whole)
