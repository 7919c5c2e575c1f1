"""`--reward` and `--watch-...`: flags in, a reward and a held-out evaluation out. Trains nothing.

A reward is written NAME, NAME=WEIGHT, NAME@KIND=WEIGHT or NAME@KIND,KIND=WEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from exitsafe.cli import defaults
from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind, Sample

if TYPE_CHECKING:
    from exitsafe.judges import Judge
    from exitsafe.lppo import Evaluation, WeightedSum

BUILT_IN = "built-in"
WATCH_SAMPLES = 32  # of each kind: evaluating 8 exits of a 7B model takes minutes


@dataclass(frozen=True, kw_only=True)
class WatchFlags:
    """The `--watch-...` flags; None where one is not given. `patience` 0 never ends the training early."""

    every: int | None = None
    judge: str | None = None
    suites: list[str] | None = None
    samples: int | None = None
    patience: int | None = None
    max_kl: float | None = None


def read_rewards(written: Sequence[str] | None) -> Judge | WeightedSum | None:
    """One name alone is that judge; anything else a weighted sum. Several parts share a judge of one name.

    Raises:
        InputError: On an unknown name or kind, or a weight that is no number.
    """
    if not written:
        return None
    from exitsafe.lppo import Part, WeightedSum

    parsed = [_parse(text) for text in written]
    judges = {name: None if name == BUILT_IN else _judge(name) for name, _, _ in parsed}
    if len(parsed) == 1 and parsed[0][1:] == (KINDS, 1.0):
        return judges[parsed[0][0]]
    return WeightedSum(parts=tuple(Part(reward=judges[name], kinds=kinds, weight=w) for name, kinds, w in parsed))


def make_watch(
    model: str,
    samples: list[Sample],
    flags: WatchFlags,
    *,
    reward: Judge | WeightedSum | None,
    seed: int,
    images: Path | None,
) -> tuple[list[Sample], Evaluation | None]:
    """The samples to train on and the held-out evaluation; without suites of its own, some of the samples are held out.

    Raises:
        InputError: If other flags are given without `--watch-every`.
    """
    if not flags.every:
        if flags.every is None and flags != WatchFlags():
            raise InputError("--watch-... flags need --watch-every N, the steps between held-out evaluations")
        return samples, None
    from exitsafe.lppo import Evaluation, keep_apart

    judge = flags.judge or other_judge(reward, samples)
    if flags.suites:
        origin = defaults.make_origin(
            model, suites=flags.suites, split="train", seed=seed, limit=flags.samples, images=images
        )
        held_out = defaults.read_samples(origin)
    else:
        samples, held_out = keep_apart(samples, per_kind=flags.samples or WATCH_SAMPLES)
    evaluation = Evaluation(
        samples=held_out,
        judge=_judge(judge),
        every=flags.every,
        patience=(5 if flags.patience is None else flags.patience) or None,
        max_kl=flags.max_kl,
    )
    return samples, evaluation


def other_judge(reward: Judge | WeightedSum | None, samples: Sequence[Sample]) -> str:
    """The default judge for held-out evaluations: the usual one for these samples, if it is not in the reward.

    Raises:
        InputError: If a judge of the reward is not available.
    """
    from exitsafe.judges.registry import DEFAULT_JUDGE, SECOND_JUDGE
    from exitsafe.lppo.judged_reward import is_world
    from exitsafe.lppo.scorer import as_scorer

    usual = ("refusal-prefix", "world-rule") if is_world(samples) else (DEFAULT_JUDGE, SECOND_JUDGE)
    rewarding = {judge.name for judge in as_scorer(reward, samples).judges}
    return next((name for name in usual if name not in rewarding), usual[-1])


def _judge(name: str) -> Judge:
    """A judge that cannot be had says so now, not after the model has been loaded."""
    from exitsafe.auditing.judging import judge_settings
    from exitsafe.judges import load_judges

    (judge,) = load_judges([name])
    judge_settings(judge)
    return judge


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
