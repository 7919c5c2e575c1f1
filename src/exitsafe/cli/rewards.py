"""`--reward` and `--eval-...`: flags in, a reward and a held-out evaluation out. Trains nothing.

A reward is written NAME, NAME=WEIGHT, NAME@KIND=WEIGHT or NAME@KIND,KIND=WEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from exitsafe.errors import InputError
from exitsafe.lppo.config import AlignSpec
from exitsafe.records import KINDS, Kind, Sample
from exitsafe.specs.inputs import Samples

if TYPE_CHECKING:
    from exitsafe.judges import Judge
    from exitsafe.lppo import Evaluation, WeightedSum

BUILT_IN = "built-in"


def read_rewards(written: Sequence[str] | None) -> Judge | WeightedSum | None:
    """One name alone is that judge; anything else a weighted sum. Several parts share a judge of one name.

    Raises:
        InputError: On an unknown name or kind, or a weight that is no number.
    """
    if not written:
        return None
    from exitsafe.auditing.judging import available_judges
    from exitsafe.lppo import Part, WeightedSum

    parsed = [_parse(text) for text in written]
    judges = {name: None if name == BUILT_IN else available_judges([name])[0] for name, _, _ in parsed}
    if len(parsed) == 1 and parsed[0][1:] == (KINDS, 1.0):
        return judges[parsed[0][0]]
    return WeightedSum(parts=tuple(Part(reward=judges[name], kinds=kinds, weight=w) for name, kinds, w in parsed))


def hold_out(
    spec: AlignSpec, samples: list[Sample], *, reward: Judge | WeightedSum | None
) -> tuple[list[Sample], Evaluation | Literal["auto"] | None]:
    """The samples to train on and the held-out evaluation; without suites of its own, some of the samples are held out.

    Raises:
        InputError: If a judge is unknown or not available.
    """
    wanted = spec.evaluation
    if not wanted.every:
        return samples, "auto" if wanted.every is None else None
    from exitsafe.auditing.judging import available_judges
    from exitsafe.data.source import find_samples
    from exitsafe.lppo.evaluation import HELD_OUT_SAMPLES, Evaluation, keep_apart, other_judge
    from exitsafe.lppo.scorer import as_scorer

    judge = wanted.judge or other_judge(as_scorer(reward, samples, method=spec.lppo.method), samples)
    if wanted.suites:
        suites = Samples(suites=wanted.suites, limit=wanted.num_samples, images=spec.samples.images)
        held_out = find_samples(spec.model, suites, split="train", seed=spec.lppo.seed).read()
    else:
        samples, held_out = keep_apart(samples, per_kind=wanted.num_samples or HELD_OUT_SAMPLES)
    evaluation = Evaluation(
        samples=held_out,
        judge=available_judges([judge])[0],
        every=wanted.every,
        patience=wanted.patience or None,
        max_kl=wanted.max_kl,
    )
    return samples, evaluation


def _parse(text: str) -> tuple[str, tuple[Kind, ...], float]:
    """Name, kinds and weight, read from the right: a name may be a folder with any signs in it.

    >>> _parse("reward:hh@harmful=0.5")
    ('reward:hh', ('harmful',), 0.5)
    """
    name, weight, kinds = text, 1.0, KINDS
    before, sign, last = name.rpartition("=")
    if sign and "/" not in last:
        name, weight = before, _number(last, text)
    before, sign, last = name.rpartition("@")
    if sign and "/" not in last:
        name, kinds = before, _kinds(last, text)
    return name, kinds, weight


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--reward {whole}: {text!r} is no number; write NAME=WEIGHT, e.g. qwen3guard=0.5")
    return number


def _kinds(text: str, whole: str) -> tuple[Kind, ...]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"--reward {whole}: kind {unknown[0]!r} is unknown; choose {', '.join(KINDS)}")
    return cast("tuple[Kind, ...]", tuple(kinds))
