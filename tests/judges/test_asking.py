from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from exitsafe.errors import InputError, RunError
from exitsafe.judges.asking import ask_judge, check_judges, tell_unscored, unscored_reasons
from exitsafe.records import Response, Sample, Verdict

SAMPLES = [Sample(id="a", prompt="x", kind="harmful"), Sample(id="b", prompt="x", kind="benign")]
RESPONSES = [
    Response(sample_id=s.id, exit_layer=1, text="t", num_tokens=1, finish_reason="stop", seconds=0.0) for s in SAMPLES
]


def _asr(**changes: object) -> Verdict:
    values = {"sample_id": "a", "exit_layer": 1, "judge": "fake", "measure": "asr", "score": 1.0} | changes
    return Verdict(**values)  # type: ignore[arg-type]


class Fake:
    name = "fake"
    measures: tuple[str, ...] = ("asr",)

    def __init__(self, answer: Callable[[], list[Verdict]]) -> None:
        self.answer = answer

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return self.answer()


def test_a_verdict_per_harmful_response_is_enough() -> None:
    assert ask_judge(Fake(lambda: [_asr()]), SAMPLES, RESPONSES) == [_asr()]


def test_further_kinds_may_be_judged() -> None:
    verdicts = [_asr(), _asr(sample_id="b")]
    assert ask_judge(Fake(lambda: verdicts), SAMPLES, RESPONSES) == verdicts


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_no_number_is_unscored_with_the_reason(score: float) -> None:
    (verdict,) = ask_judge(Fake(lambda: [_asr(score=score)]), SAMPLES, RESPONSES)
    assert verdict.score is None
    assert verdict.unscored == f"the judge returned {score}, which is not a number"


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([], "returned 0 asr verdicts for sample a at exit 1"),
        ([_asr(), _asr()], "returned 2 asr verdicts for sample a"),
        ([_asr(), _asr(sample_id="a moss")], "returned a verdict on a response that it was not given; copy sample_id"),
        ([_asr(), _asr(measure="refusal")], "returned a measure that it does not declare; return asr"),
        ([_asr(judge="moss")], "returned a verdict under another name; use its own"),
        ([0.5], "returned a float; return Verdict objects"),
        ([_asr(label=None)], "returned a label of type NoneType; return a string"),
        ([_asr(score=7.0)], "returned 7 for asr; return a number from 0 to 1"),
        ([_asr(score="yes")], "returned a score of type str; return a number"),
    ],
)
def test_a_wrong_answer_is_refused_without_quoting_it(verdicts: list[Verdict], message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        ask_judge(Fake(lambda: verdicts), SAMPLES, RESPONSES)
    assert "moss" not in str(caught.value)


def test_a_failing_judge_is_one_line_without_any_text_and_keeps_its_cause() -> None:
    def fail() -> list[Verdict]:
        raise ValueError("cannot read: mix moss with foam")

    with pytest.raises(RunError, match=r"judge fake failed \(ValueError\); the answers are saved") as caught:
        ask_judge(Fake(fail), SAMPLES, RESPONSES)
    assert "moss" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_open_scale_has_no_ends() -> None:
    judge = Fake(lambda: [_asr(measure="reward", score=-7.5)])
    judge.measures = ("reward",)
    assert ask_judge(judge, SAMPLES, RESPONSES)[0].score == -7.5


def test_what_a_judge_says_to_the_user_passes_through() -> None:
    def fail() -> list[Verdict]:
        raise InputError("the endpoint needs a key")

    with pytest.raises(InputError, match=r"^the endpoint needs a key$"):
        ask_judge(Fake(fail), SAMPLES, RESPONSES)


def test_judges_are_checked_before_any_work() -> None:
    judge = Fake(list)
    with pytest.raises(InputError, match="judge fake is given 2 times"):
        check_judges([judge, judge])
    judge.measures = ("niceness",)
    with pytest.raises(InputError, match="judge fake measures 'niceness'; choose from asr"):
        check_judges([judge])


def test_reasons_are_counted_by_answer_the_most_frequent_first() -> None:
    verdicts = [_asr(sample_id=str(n), score=None, unscored="late" if n else "empty") for n in range(3)]
    verdicts += [_asr(sample_id="1", measure="refusal", score=None, unscored="late"), _asr(sample_id="9")]
    assert unscored_reasons(verdicts) == {"fake": {"late": 2, "empty": 1}}
    assert tell_unscored(verdicts) == ["judge fake could not score 3 of 4 answers: late (2), empty (1)"]
    assert tell_unscored([_asr()]) == []


def test_a_judge_with_a_reason_for_each_answer_does_not_fill_the_screen() -> None:
    verdicts = [_asr(sample_id=str(n), score=None, unscored=f"{n} no\n" + 900 * "x") for n in range(1200)]
    (line,) = tell_unscored(verdicts)
    assert line.endswith(", and 1,195 other reasons")
    assert "\n" not in line
    assert len(line) < 800
