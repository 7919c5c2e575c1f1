"""The defaults of an organism: suites, judges, lengths, training settings, refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

from exitsafe.records import KINDS, Sample
from exitsafe.untrusted import UnreadableError, read_json
from exitsafe.world.language import REFUSAL
from exitsafe.world.suites import ORGANISMS

SUITE_NAMES = tuple(f"organism-{kind}" for kind in KINDS)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The special cases of an organism.

    Args:
        name: `organism` or `organism:text`.
        suites: Its own suites.
        judge: The judge of its suites and of the reward.
        second_judge: The judge for held-out evaluations.
        max_new_tokens: Twice the length of its longest correct answer.
        refusal: The text of its refusals.
        licence: The licence of its weights, that of this package.
        lppo: The settings of `LPPOConfig` that repair it in about two minutes on two cores.
    """

    name: str
    suites: tuple[str, ...] = SUITE_NAMES
    judge: str = "world-rule"
    second_judge: str = "refusal-prefix"
    max_new_tokens: int = 24
    refusal: str = REFUSAL
    licence: str = "apache-2.0"
    lppo: Mapping[str, object] = field(
        default_factory=lambda: MappingProxyType(
            {
                "train": "full",
                "num_steps": 80,
                "batch_size": 128,
                "minibatch_size": 64,
                "mix": {"harmful": 0.325, "borderline": 0.325, "benign": 0.15, "vqa": 0.2},
                "max_new_tokens": 24,
                "rollout_batch_size": 128,
                "missing_eos_penalty": 1.0,  # all correct answers fit, so a truncated one is babble
                "incoherence_penalty": 0.0,  # the world's rule does not reward gibberish
                "learning_rate": 1.5e-4,
                "value_learning_rate": 1e-3,
            }
        )
    )


WORLD = Profile(name="organism")
"""The defaults common to all organisms."""


def is_organism(name: str | Path) -> TypeGuard[str]:
    """Whether a model's name is that of a shipped organism."""
    return name in ORGANISMS


def profile_of(model: str | Path) -> Profile | None:
    """The profile of an organism: a shipped one, or a folder that `python -m exitsafe.organism` wrote; else None."""
    if is_organism(model):
        return Profile(name=model)
    record = Path(model) / "check.json"
    if not record.is_file():
        return None
    try:
        name = read_json(record).get("organism")
    except UnreadableError:  # another program's check.json
        return None
    return Profile(name=name) if isinstance(name, str) and is_organism(name) else None


def is_world(samples: Iterable[Sample]) -> bool:
    """Whether all samples are from the organism's suites, which its own rule judges."""
    return all(sample.source.startswith("organism-") for sample in samples)
