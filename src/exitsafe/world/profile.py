"""What an organism brings where a command or a call is silent: suites, judges, lengths, training settings, refusal."""

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
        judge: The judge of its suites, and the reward's.
        second_judge: For held-out evaluations.
        max_new_tokens: Its longest right answer has half of that.
        refusal: Its own words.
        licence: Of its weights: this package's.
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
                "missing_eos_penalty": 1.0,  # all answers of the world fit, so a truncated one is babble
                "incoherence_penalty": 0.0,  # the world's rule rewards no gibberish
                "learning_rate": 1.5e-4,
                "value_learning_rate": 1e-3,
            }
        )
    )


WORLD = Profile(name="organism")
"""What all organisms share."""


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
    except UnreadableError:  # somebody else's check.json
        return None
    return Profile(name=name) if isinstance(name, str) and is_organism(name) else None


def is_world(samples: Iterable[Sample]) -> bool:
    """Whether all samples are of the organism's suites, which its own rule judges."""
    return all(sample.source.startswith("organism-") for sample in samples)
