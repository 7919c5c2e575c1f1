"""Whatever `align` was given as its reward, as one kind of function: answers in, checked scores out.

A reward is a callable, a judge, the built-in one or a weighted sum of them; a part of a sum scores exactly as it would
alone. Scores are brought to one scale here, if asked, each part by itself. Knows nothing about models and training.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

from exitsafe.errors import InputError
from exitsafe.judges import Judge, ModelJudge
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.judges.registry import DEFAULT_JUDGE, SECOND_JUDGE
from exitsafe.lppo.judged_reward import JudgedReward, needs_helper, refusal_judge
from exitsafe.lppo.reward import Reward, Score
from exitsafe.records import KINDS, Kind, Response, Sample

BUILT_IN = "built-in"
CALIBRATION_SAMPLES = 64
"""Enough for reward models by default: the mean has a standard error of an eighth of a deviation."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward of a weighted sum.

    Args:
        reward: A callable, a judge, or None for the built-in reward.
        weight: What its score is multiplied by.
        kinds: It scores samples of these kinds only.

    Raises:
        InputError: If the weight is 0 or no number, or a kind is unknown.
    """

    reward: Reward | Judge | None = None
    weight: float = 1.0
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0.0:
            raise InputError(f"reward {self.label} has the weight {self.weight}: give a number other than 0")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(f"reward {self.label} is for no known kind of sample: choose from {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", tuple(kind for kind in KINDS if kind in self.kinds))

    @property
    def label(self) -> str:
        """The reward's name, and the kinds where they are not all."""
        name = BUILT_IN if self.reward is None else _name(self.reward)
        return name if self.kinds == KINDS else f"{name}@{','.join(self.kinds)}"


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """Several rewards, each with a weight and for some kinds of samples.

    An answer's score is the sum over the parts for its kind; it is unscored if one of these is.

    Raises:
        InputError: Without parts, or if two are the same reward for the same kinds.

    Examples:
        >>> always_right = Part(reward=lambda samples, responses: [1.0], kinds=("vqa",))
        >>> reward = WeightedSum(parts=(Part(weight=0.5), always_right))
        >>> [part.label for part in reward.parts]
        ['built-in', '<lambda>@vqa']
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("a weighted sum needs at least one part")
        label, count = Counter(part.label for part in self.parts).most_common(1)[0]
        if count > 1:
            raise InputError(f"reward {label} is given {count} times: give it once, with the sum of the weights")


def as_scorer(reward: Reward | Judge | WeightedSum | None, samples: Sequence[Sample]) -> Scorer:
    """What `align` was given, ready to score.

    None is the built-in reward. A judge scores what it measures, and the built-in reward's own judge the rest: a
    judge of harmful answers alone would teach the model to refuse everything.

    Raises:
        InputError: If no part of a sum scores one of the samples' kinds, or a judge is needed that is not available.
    """
    parts = parts_of(reward)
    covered = {kind for part in parts for kind in part.kinds}
    for kind in KINDS:
        if kind not in covered and any(sample.kind == kind for sample in samples):
            raise InputError(f"no part of the reward scores {kind} samples: add one for them, or leave them out")
    return Scorer(parts, samples, is_sum=isinstance(reward, WeightedSum))


def parts_of(reward: Reward | Judge | WeightedSum | None) -> tuple[Part, ...]:
    """The parts of a sum; anything else is one part, for all kinds."""
    return reward.parts if isinstance(reward, WeightedSum) else (Part(reward=reward),)


def need_helper(parts: Sequence[Part]) -> bool:
    """Whether parts need the built-in reward's own judge in addition to those that they name."""
    return any(_is_judged(part) and needs_helper(cast(Judge | None, part.reward), part.kinds) for part in parts)


class Scorer:
    """The weighted sum of one or more parts.

    `name` holds the names of all judges and callables, joined by "+"; with `settings` it stands in the run's record.
    `gives_costs` says whether scores tell what was refused and answered rightly, as constraints need.
    """

    def __init__(self, parts: Sequence[Part], samples: Sequence[Sample], *, is_sum: bool) -> None:
        self.parts = parts
        self.calibration: list[tuple[float, float]] = [(0.0, 1.0) for _ in parts]
        self._is_sum = is_sum
        helper = _helper(parts, samples)
        self._rewards = [_make_reward(part, samples, helper) for part in parts]
        self.name = "+".join(dict.fromkeys(name for reward in self._rewards for name in reward.name.split("+")))
        telling = [part.kinds for part, reward in zip(parts, self._rewards, strict=True) if reward.gives_costs]
        self.gives_costs = all(any(sample.kind in kinds for kinds in telling) for sample in samples)

    @property
    def judges(self) -> list[Judge]:
        """The judges whose word counts, each once."""
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
        """What decides the scores, as JSON: the name, a sum's weights, and what the judges' models are."""
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
            if _is_proxy(judge):
                warnings.warn(
                    f"the reward {judge.name} is a proxy that does not read meaning; training optimises it, not "
                    "safety: prefer a guard model, such as --reward qwen3guard (in Python: reward=...), and evaluate "
                    "with another judge",
                    stacklevel=3,
                )

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        """Scores by the calibration as it is."""
        by_part = self._by_part(samples, responses)
        return [self._sum([scores.get(place) for scores in by_part]) for place in range(len(samples))]

    def raw_scores(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[list[float | None]]:
        """Of each answer the score that each part gave it; None where it gave none, or is not for it."""
        found = self._by_part(samples, responses)
        return [[scores[place].value if place in scores else None for scores in found] for place in range(len(samples))]

    def num_calibration(self, wanted: int | None) -> int:
        """How many answers of the untrained model to calibrate by; None leaves that to the parts' scales."""
        if wanted is not None:
            return wanted
        return CALIBRATION_SAMPLES if any(map(_has_open_scale, self.parts)) else 0

    def calibrate(self, raw_scores: Sequence[Sequence[float | None]], *, only_open: bool = False) -> None:
        """Bring scores such as these to mean 0, deviation 1, each part by itself.

        Args:
            raw_scores: Of each answer, by part.
            only_open: Skip parts whose scale is known, from -1 to 1.

        Raises:
            InputError: If a part gives them all the same score, so that nothing could be learnt from it.
        """
        self.calibration = [
            (0.0, 1.0)
            if only_open and not _has_open_scale(part)
            else mean_and_deviation([score for score in scores if score is not None], part.label)
            for part, scores in zip(self.parts, zip(*raw_scores, strict=True), strict=True)
        ]

    def _by_part(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[dict[int, Score]]:
        """Each part's scores by place, of the places that are for it."""
        found = []
        for part, reward in zip(self.parts, self._rewards, strict=True):
            places = [place for place, sample in enumerate(samples) if sample.kind in part.kinds]
            asked = [samples[place] for place in places], [responses[place] for place in places]
            found.append(dict(zip(places, reward(*asked) if places else [], strict=True)))
        return found

    def _sum(self, scores: Sequence[Score | None]) -> Score:
        """One answer's score of the scores of the parts; None where a part is not for it."""
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
    """What normalises scores: their mean and (population) standard deviation.

    Raises:
        InputError: If there is none, or all are the same, so that nothing could be learnt from them.
    """
    way_out = "check the reward, raise calibration_samples, or set calibration_samples to 0"
    if not scores:
        raise InputError(f"reward {label} scored none of the calibration answers: {way_out}")
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    if deviation <= 1e-9 * abs(mean) or len(scores) == 1:  # would only amplify rounding
        raise InputError(f"reward {label} gave all {len(scores)} calibration answers the same score: {way_out}")
    return mean, deviation


def part_means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of each part's scores, as the part gave them, over the answers that it scored."""
    labels = dict.fromkeys(label for score in scores for label in score.parts)
    return {label: statistics.fmean(score.parts[label] for score in scores if label in score.parts) for label in labels}


def _make_reward(part: Part, samples: Sequence[Sample], helper: Judge | None) -> JudgedReward | _CheckedCallable:
    if not _is_judged(part):
        return _CheckedCallable(cast(Reward, part.reward))
    judge = cast(Judge | None, part.reward)
    return JudgedReward(samples, first=judge, helper=helper if needs_helper(judge, part.kinds) else None)


def _helper(parts: Sequence[Part], samples: Sequence[Sample]) -> Judge | None:
    """The judge that parts without one of their own, or with one that measures too little, share; None if none does."""
    if not need_helper(parts):
        return None
    helper = refusal_judge(samples)
    given = [cast(Judge, part.reward) for part in parts if part.reward is not None and _is_judged(part)]
    return next((judge for judge in given if judge.name == helper.name), helper)  # one copy of its weights


def _is_proxy(judge: Judge) -> bool:
    return judge.name == RefusalPrefix.name


def _is_judged(part: Part) -> bool:
    return part.reward is None or hasattr(part.reward, "measures")


def _has_open_scale(part: Part) -> bool:
    """Whether a part is a reward model; the other judges give shares, and a callable's scale is its author's choice."""
    return "reward" in getattr(part.reward, "measures", ())


def _name(reward: Reward | Judge) -> str:
    """A judge's own name, a function's or a class's."""
    if hasattr(reward, "measures"):
        return cast(Judge, reward).name
    return str(getattr(reward, "__qualname__", type(reward).__qualname__))


def _first(values: Iterable[float | None]) -> float | None:
    """The first part that says."""
    return next((value for value in values if value is not None), None)


class _CheckedCallable:
    """A user's reward function; what it returns is checked before anything is learnt from it."""

    gives_costs = False

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name = _name(reward)
        self.unscored: Counter[str] = Counter()

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        returned: object = self.reward(samples, responses)
        try:
            found = list(cast(Iterable[object], returned))
            if isinstance(returned, str | bytes):
                raise TypeError
        except TypeError as error:  # tensors of no dimension too
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
