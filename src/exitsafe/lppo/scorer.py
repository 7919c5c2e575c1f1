"""The reward as one function: answers in, checked scores out.

A reward is a callable, a judge, the built-in one or a weighted sum of them; a part of a sum scores exactly as it would
alone. Each part can be normalised by itself.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import SupportsFloat, cast

from exitsafe.errors import InputError
from exitsafe.judges import Judge, ModelJudge
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.judges.registry import DEFAULT_JUDGE, SECOND_JUDGE
from exitsafe.lppo.config import Method
from exitsafe.lppo.judged_reward import JudgedReward, needs_helper, refusal_judge
from exitsafe.lppo.reward import Part, Reward, Score, WeightedSum, is_judge, reward_name
from exitsafe.records import KINDS, Response, Sample

CALIBRATION_SAMPLES = 64
"""Enough for reward models by default: the mean has a standard error of an eighth of a deviation."""


def as_scorer(
    reward: Reward | Judge | WeightedSum | None, samples: Sequence[Sample], *, method: Method = "lppo"
) -> Scorer:
    """The reward that `align` was given, ready to score; one without parts for `sft`, which needs none.

    None is the built-in reward. A judge scores what it measures, and the built-in reward's own judge the rest: a
    judge of harmful answers alone would teach the model to refuse everything.

    Raises:
        InputError: If no part of a sum scores one of the samples' kinds, a judge is needed that is not available, or a
            reward is given for `sft`.
    """
    if method == "sft":
        if reward is not None:
            raise InputError("method 'sft' learns from given answers, not from a reward: leave the reward out")
        return Scorer((), samples, is_sum=False)
    is_sum = isinstance(reward, WeightedSum)
    parts = reward.parts if isinstance(reward, WeightedSum) else (Part(reward=reward),)
    covered = {kind for part in parts for kind in part.kinds}
    for kind in KINDS:
        if kind not in covered and any(sample.kind == kind for sample in samples):
            raise InputError(f"no part of the reward scores {kind} samples: add one for them, or leave them out")
    return Scorer(parts, samples, is_sum=is_sum)


class Scorer:
    """The weighted sum of one or more parts.

    Attributes:
        name: The names of all judges and callables, joined by "+".
        gives_costs: Whether scores say what was refused and answered correctly, as constraints need.
        calibration: Mean and deviation that normalise each part.
    """

    def __init__(self, parts: Sequence[Part], samples: Sequence[Sample], *, is_sum: bool) -> None:
        self.parts = parts
        self.calibration: list[tuple[float, float]] = [(0.0, 1.0) for _ in parts]
        self._is_sum = is_sum
        helper = _helper(parts, samples)
        self._rewards = [_make_reward(part, samples, helper) for part in parts]
        self.name = "+".join(dict.fromkeys(name for reward in self._rewards for name in reward.name.split("+")))
        with_costs = [part.kinds for part, reward in zip(parts, self._rewards, strict=True) if reward.gives_costs]
        self.gives_costs = all(any(sample.kind in kinds for kinds in with_costs) for sample in samples)

    @property
    def judges(self) -> list[Judge]:
        """The judges that score, each once."""
        found = {
            judge.name: judge for reward in self._rewards if isinstance(reward, JudgedReward) for judge in reward.judges
        }
        return list(found.values())

    @property
    def unscored(self) -> Counter[str]:
        """How often each reason left an answer without a score, in this process and since it started."""
        return sum((reward.unscored for reward in self._rewards), Counter())

    @property
    def settings(self) -> dict[str, object]:
        """Everything that decides the scores, as JSON: name, weights of a sum, the judges' models."""
        found: dict[str, object] = {"reward": self.name}
        if self._is_sum:
            found["reward_parts"] = {part.label: part.weight for part in self.parts}
        models = {judge.name: judge.settings for judge in self.judges if isinstance(judge, ModelJudge)}
        return found | ({"reward_models": models} if models else {})

    def warn_of_proxies(self) -> None:
        """Warn, before training, about judges of the reward that do not read meaning or that audits use too."""
        for judge in self.judges:
            if judge.name == DEFAULT_JUDGE:
                warnings.warn(
                    f"{DEFAULT_JUDGE} is the reward, and audits use it too: also judge both audits with another model, "
                    f"e.g. exitsafe judge RUN --judge {SECOND_JUDGE}",
                    stacklevel=3,
                )
            if judge.name == RefusalPrefix.name:
                warnings.warn(
                    f"the reward {judge.name} is a proxy that does not read meaning; training optimises it, not "
                    "safety: prefer a guard model, such as --reward qwen3guard (in Python: reward=...), and evaluate "
                    "with another judge",
                    stacklevel=3,
                )

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        """Scores with the current calibration."""
        by_part = self._by_part(samples, responses)
        return [self._sum([scores.get(place) for scores in by_part]) for place in range(len(samples))]

    def raw_scores(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[list[float | None]]:
        """For each answer, the score from each part; None where it gave none, or is not for answers of this kind."""
        found = self._by_part(samples, responses)
        return [[scores[place].value if place in scores else None for scores in found] for place in range(len(samples))]

    def num_calibration(self, wanted: int | None) -> int:
        """How many answers of the untrained model to calibrate with; None decides by the parts' scales."""
        if wanted is not None:
            return wanted
        return CALIBRATION_SAMPLES if any(map(_has_open_scale, self.parts)) else 0

    def calibrate(self, raw_scores: Sequence[Sequence[float | None]], *, only_open: bool = False) -> None:
        """Normalise scores like these to mean 0, deviation 1, each part by itself.

        Args:
            raw_scores: For each answer, by part.
            only_open: Skip parts whose scale is known, from -1 to 1.

        Raises:
            InputError: If a part gives all of them the same score, so that nothing could be learnt from it.
        """
        self.calibration = [
            (0.0, 1.0)
            if only_open and not _has_open_scale(part)
            else mean_and_deviation([score for score in scores if score is not None], part.label)
            for part, scores in zip(self.parts, zip(*raw_scores, strict=True), strict=True)
        ]

    def _by_part(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[dict[int, Score]]:
        """Each part's scores, by place, for answers of its kinds."""
        found = []
        for part, reward in zip(self.parts, self._rewards, strict=True):
            places = [place for place, sample in enumerate(samples) if sample.kind in part.kinds]
            asked = [samples[place] for place in places], [responses[place] for place in places]
            found.append(dict(zip(places, reward(*asked) if places else [], strict=True)))
        return found

    def _sum(self, scores: Sequence[Score | None]) -> Score:
        """One answer's score from those of the parts; None for a part that is not for its kind."""
        given = [score for score in scores if score is not None]
        return Score(
            value=None if any(score.value is None for score in given) else self._total(scores),
            attack_success=_first(score.attack_success for score in given),
            refusal=_first(score.refusal for score in given),
            vqa_accuracy=_first(score.vqa_accuracy for score in given),
            parts={
                part.label: score.value
                for part, score in zip(self.parts, scores, strict=True)
                if score is not None and score.value is not None
            },
        )

    def _total(self, scores: Sequence[Score | None]) -> float:
        return sum(
            part.weight * (score.value - mean) / deviation
            for part, score, (mean, deviation) in zip(self.parts, scores, self.calibration, strict=True)
            if score is not None and score.value is not None
        )


def mean_and_deviation(scores: Sequence[float], label: str) -> tuple[float, float]:
    """Mean and (population) standard deviation, to normalise scores.

    Raises:
        InputError: If there are no scores, or all are the same, so that nothing could be learnt from them.
    """
    advice = "check the reward, raise calibration_samples, or set calibration_samples to 0"
    if not scores:
        raise InputError(f"reward {label} scored none of the calibration answers: {advice}")
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    if deviation <= 1e-9 * abs(mean) or len(scores) == 1:  # would only amplify rounding
        raise InputError(f"reward {label} gave all {len(scores)} calibration answers the same score: {advice}")
    return mean, deviation


def part_means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of each part's raw scores over the answers that it scored."""
    labels = dict.fromkeys(label for score in scores for label in score.parts)
    return {label: statistics.fmean(score.parts[label] for score in scores if label in score.parts) for label in labels}


def _make_reward(part: Part, samples: Sequence[Sample], helper: Judge | None) -> JudgedReward | _CheckedCallable:
    reward = part.reward
    if reward is None or is_judge(reward):
        return JudgedReward(samples, first=reward, helper=helper if needs_helper(reward, part.kinds) else None)
    return _CheckedCallable(cast(Reward, reward))


def _helper(parts: Sequence[Part], samples: Sequence[Sample]) -> Judge | None:
    """The built-in reward's judge, shared by the parts that need it; None if none does."""
    judged = [(part.reward, part.kinds) for part in parts if part.reward is None or is_judge(part.reward)]
    if not any(needs_helper(judge, kinds) for judge, kinds in judged):
        return None
    helper = refusal_judge(samples)
    named = (judge for judge, _ in judged if judge is not None and judge.name == helper.name)
    return next(named, helper)  # weights are loaded once


def _has_open_scale(part: Part) -> bool:
    """Whether a part is a reward model; other judges give shares, and a callable's scale is its author's choice."""
    return "reward" in getattr(part.reward, "measures", ())


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


class _CheckedCallable:
    """A user's reward function; its return value is checked before anything is learnt from it."""

    gives_costs = False

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name = reward_name(reward)
        self.unscored: Counter[str] = Counter()

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        returned: object = self.reward(samples, responses)
        try:
            found = list(cast(Iterable[object], returned))
            if isinstance(returned, str | bytes):
                raise TypeError
        except TypeError as error:  # such as a number, or a tensor without a dimension
            raise InputError(
                f"reward {self.name} returned a {type(returned).__name__}: return a list with one number per response, "
                "or NaN for unscored"
            ) from error
        values = [self._number(value) for value in found]
        if len(values) != len(responses):
            raise InputError(
                f"reward {self.name} returned {len(values)} scores for {len(responses)} responses: return one each"
            )
        if missing := sum(map(math.isnan, values)):
            self.unscored[f"{self.name}: the reward returned NaN"] += missing
        return [Score(value=None if math.isnan(value) else value) for value in values]

    def _number(self, value: object) -> float:
        """Numbers of Python, numpy and torch are accepted; a number as text is a mistake."""
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            number = float(cast(SupportsFloat, value))
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
            raise InputError(
                f"reward {self.name} returned a {type(value).__name__} as a score: return one number per response, or "
                "NaN for unscored"
            ) from error
        if math.isinf(number):
            raise InputError(f"reward {self.name} returned an infinite score: return finite ones, or NaN for unscored")
        return number
