"""Weighted sums: by hand, by kind, unscored, calibrated part by part; callables checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from exitsafe.errors import InputError
from exitsafe.lppo import Part, WeightedSum
from exitsafe.lppo.scorer import as_scorer, mean_and_deviation, part_means
from exitsafe.records import KINDS, Kind, Response, Sample, Verdict
from tests.judges.tiny_judges import RuleGuard, rule_guard  # noqa: F401

pytestmark = pytest.mark.usefixtures("rule_guard")


def sample(kind: Kind, number: int = 0) -> Sample:
    return Sample(id=f"{kind}-{number}", prompt="p", kind=kind, source="mine", answers=("red",))


def response(text: str) -> Response:
    return Response(sample_id="s", exit_layer=1, text=text, num_tokens=3, finish_reason="stop", seconds=0.0)


class RewardModel:
    """Any answer's length, on a scale of its own; unscored if empty."""

    name = "reward:long"
    measures = ("reward",)

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": "long", "revision": "abc"}

    def unload(self) -> None:
        pass

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict(
                sample_id=r.sample_id,
                exit_layer=r.exit_layer,
                judge=self.name,
                measure="reward",
                score=100.0 + len(r.text) if r.text else None,
                unscored=None if r.text else "empty",
            )
            for r in responses
        ]


def num_words(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
    return [float(len(response.text.split())) for response in responses]


ASKED = [sample("harmful"), sample("benign"), sample("vqa")]
SAID = [response("sorry, no"), response("a b c d"), response("red")]


def test_a_sum_by_hand_each_part_for_its_kinds() -> None:
    reward = WeightedSum(
        parts=(
            Part(reward=RewardModel(), weight=0.5, kinds=("harmful",)),
            Part(reward=num_words, weight=-2.0, kinds=("vqa", "benign")),
            Part(weight=3.0),
        )
    )
    scores = as_scorer(reward, ASKED)(ASKED, SAID)
    # .5 * 109 + 3 * 1; -2 * 4 + 3 * 1; -2 * 1 + 3 * 1
    assert [score.value for score in scores] == [57.5, -5.0, 1.0]
    assert scores[0].parts == {"reward:long@harmful": 109.0, "built-in": 1.0}
    assert scores[2].parts == {"num_words@benign,vqa": 1.0, "built-in": 1.0}
    assert [score.attack_success for score in scores] == [0.0, None, None]
    assert [score.refusal for score in scores] == [1.0, 0.0, 0.0]
    assert part_means(scores) == {"reward:long@harmful": 109.0, "built-in": 1.0, "num_words@benign,vqa": 2.5}


def test_a_part_of_a_sum_scores_as_it_would_alone() -> None:
    alone = as_scorer(RewardModel(), ASKED)(ASKED, SAID)
    together = as_scorer(WeightedSum(parts=(Part(reward=RewardModel()),)), ASKED)(ASKED, SAID)
    assert [score.value for score in together] == [score.value for score in alone] == [109.0, 107.0, 103.0]


def test_an_answer_is_unscored_if_a_part_for_it_is() -> None:
    reward = WeightedSum(parts=(Part(), Part(reward=RewardModel(), kinds=("harmful",))))
    asked = [sample("harmful"), sample("benign")]
    scores = as_scorer(reward, asked)(asked, [response(""), response("")])
    assert [score.value for score in scores] == [None, -1.0]
    assert scores[0].parts == {"built-in": 0.0}


def test_each_part_is_normalised_by_itself() -> None:
    reward = WeightedSum(parts=(Part(reward=RewardModel(), weight=2.0), Part(reward=num_words, kinds=("benign",))))
    scorer = as_scorer(reward, ASKED)
    asked = [sample("benign"), sample("benign"), sample("harmful"), sample("harmful")]
    answers = [response("a b c d e"), response("abcde"), response("123456789"), response("12345")]
    scorer.calibrate(scorer.raw_scores(asked, answers))
    # lengths 9, 5, 9, 5: mean 107, deviation 2; words of the benign ones 5, 1: mean 3, deviation 2
    assert scorer.calibration == [(107.0, 2.0), (3.0, 2.0)]
    (score,) = scorer([sample("benign")], [response("a b c de")])
    assert score.value == 2.0 * (108.0 - 107.0) / 2.0 + (4.0 - 3.0) / 2.0
    assert score.parts == {"reward:long": 108.0, "num_words@benign": 4.0}
    with pytest.raises(InputError, match="reward num_words@benign gave all 1 calibration answers the same score"):
        scorer.calibrate(scorer.raw_scores([sample("benign"), sample("vqa")], [response("a"), response("bc")]))


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 3.0], "mine") == (2.0, 1.0)
    with pytest.raises(InputError, match="reward mine gave all 2 calibration answers the same score"):
        mean_and_deviation([1.0, 1.0], "mine")


def test_the_record_names_every_judge_once_with_weights_and_models() -> None:
    built_in, guard = "qwen3guard+vqa+coherence", {"qwen3guard": RuleGuard.settings}
    assert as_scorer(None, ASKED).settings == {"reward": built_in, "reward_models": guard}
    assert as_scorer(num_words, ASKED).settings == {"reward": "num_words"}
    reward = WeightedSum(parts=(Part(reward=RewardModel(), weight=0.5, kinds=("harmful",)), Part()))
    assert as_scorer(reward, ASKED).settings == {
        "reward": "reward:long+vqa+coherence+qwen3guard",
        "reward_parts": {"reward:long@harmful": 0.5, "built-in": 1.0},
        "reward_models": {"reward:long": {"model": "long", "revision": "abc"}} | guard,
    }


def test_costs_are_given_if_a_part_tells_them_for_every_sample() -> None:
    only_vqa = Part(kinds=("vqa",))
    assert as_scorer(None, ASKED).gives_costs
    assert not as_scorer(num_words, ASKED).gives_costs
    assert not as_scorer(WeightedSum(parts=(only_vqa, Part(reward=num_words))), ASKED).gives_costs
    assert as_scorer(WeightedSum(parts=(only_vqa, Part(reward=num_words))), ASKED[2:]).gives_costs
    assert as_scorer(WeightedSum(parts=(Part(), Part(reward=num_words))), ASKED).gives_costs


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "needs at least one part"),
        ([{"weight": 0.0}], "reward built-in has the weight 0.0"),
        ([{"weight": math.nan}], "has the weight nan"),
        ([{"kinds": ()}], "is for no known kind of sample"),
        ([{"kinds": ("harmless",)}], "is for no known kind of sample"),
        ([{"kinds": ("harmful", "harmless")}], "is for no known kind of sample"),
        ([{"reward": num_words}, {"reward": num_words, "weight": 2.0}], "reward num_words is given 2 times"),
        ([{"kinds": ("harmful", "vqa")}], "no part of the reward scores benign samples"),
    ],
)
def test_sums_that_make_no_sense(parts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_scorer(WeightedSum(parts=tuple(Part(**part) for part in parts)), ASKED)


def test_kinds_are_put_in_order() -> None:
    assert Part(kinds=tuple(reversed(KINDS))) == Part()


def test_a_callable_is_taken_at_its_word_and_checked() -> None:
    asked, said = [sample("benign")] * 2, [response("a"), response("b")]
    scores = as_scorer(lambda samples, responses: [2.0, math.nan], asked)(asked, said)
    assert [score.value for score in scores] == [2.0, None]
    with pytest.raises(InputError, match="returned 1 scores for 2 responses"):
        as_scorer(lambda samples, responses: [2.0], asked)(asked, said)
    with pytest.raises(InputError, match="infinite score"):
        as_scorer(lambda samples, responses: [2.0, math.inf], asked)(asked, said)


def test_numbers_of_any_library_are_scores() -> None:
    asked, said = [sample("benign")] * 2, [response("a"), response("b")]
    for returned in (
        (1, True),
        np.array([1.0, 1.0]),
        torch.ones(2),
        (np.float32(1.0), torch.tensor(1.0)),
        iter([1, 1]),
    ):
        scores = as_scorer(lambda *_, found=returned: found, asked)(asked, said)
        assert [score.value for score in scores] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "reward lost returned a NoneType: return a list with one number per response"),
        (1.0, "reward lost returned a float: return a list"),
        ("12", "reward lost returned a str: return a list"),
        ([1.0, None], "reward lost returned a NoneType as a score: return one number per response"),
        (["1", "2"], "reward lost returned a str as a score"),
        ([[1.0], [2.0]], "reward lost returned a list as a score"),
        (torch.ones(2, 2), "reward lost returned a Tensor as a score"),
        (torch.tensor(1.0), "reward lost returned a Tensor: return a list"),
        (np.array(1.0), "reward lost returned a ndarray: return a list"),
        (np.ones((2, 2)), "reward lost returned a ndarray as a score"),
        ({"a": 1.0, "b": 2.0}, "reward lost returned a str as a score"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_in_one_line(returned: Any, message: str) -> None:
    def lost(samples: Sequence[Sample], responses: Sequence[Response]) -> Any:
        return returned

    lost.__qualname__ = "lost"
    asked, said = [sample("benign")] * 2, [response("a"), response("b")]
    with pytest.raises(InputError, match=message) as caught:
        as_scorer(lost, asked)(asked, said)
    assert "\n" not in str(caught.value)
