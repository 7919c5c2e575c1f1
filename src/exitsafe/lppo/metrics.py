"""The line that a training step leaves in metrics.jsonl. Tensors and records in, numbers out.

docs/lppo.md explains each name. Rates and means are over the answers that were scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from exitsafe.lppo.advantage import has_equal_scores
from exitsafe.lppo.experience import Measured
from exitsafe.lppo.kl import k1, k3
from exitsafe.lppo.loss import masked_mean
from exitsafe.lppo.reward import Score
from exitsafe.lppo.rollout import Trajectory
from exitsafe.lppo.update import UpdateStats
from exitsafe.vlm.peak import MEASURED

NEVER_TWICE = ("seconds", *MEASURED)
"""What a run repeated bit for bit does not repeat; these names end a line."""


def step_metrics(
    trajectories: Sequence[Trajectory],
    scores: Sequence[Score],
    measured: Measured,
    returns: Tensor,
    stats: UpdateStats,
) -> dict[str, Any]:
    """What happened in one step, over the whole batch, by kind of sample, by exit layer, and by both."""
    kinds = [trajectory.sample.kind for trajectory in trajectories]
    exits = [trajectory.row.exit_layer for trajectory in trajectories]
    values = [score.value for score in scores]
    attacks = [score.attack_success for score in scores]
    kl: list[float] = k1(measured.logprobs, measured.ref_logprobs, measured.mask).sum(dim=1).tolist()
    both = [f"{kind}@{exit_layer}" for kind, exit_layer in zip(kinds, exits, strict=True)]
    per_token_kl = masked_mean(k3(measured.logprobs, measured.ref_logprobs, measured.mask), measured.mask)
    return {
        "reward": _mean(values),
        "reward_by_kind": _means(values, kinds),
        "reward_by_exit": _means(values, exits),
        "reward_by_kind_and_exit": _means(values, both),
        "asr": _mean(attacks),
        "asr_by_exit": _means(attacks, exits),
        "kl": _mean(kl),
        "kl_by_exit": _means(kl, exits),
        "kl_per_token": per_token_kl.item(),
        "entropy": masked_mean(measured.entropy, measured.mask).item(),
        "explained_variance": explained_variance(measured.values, returns, measured.mask),
        **asdict(stats),
        "num_tokens": int(measured.mask.sum()),
        "num_cut": sum(trajectory.response.finish_reason == "length" for trajectory in trajectories),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - var(returns - values) / var(returns): 1 is a perfect value head, 0 one that knows only the mean."""
    variance = returns[mask].var(correction=0).item()
    if variance == 0.0:
        return None
    return 1.0 - (returns - values)[mask].var(correction=0).item() / variance


def num_equal_groups(scores: Tensor, groups: Tensor) -> int:
    """Groups without a gradient, because all their scores `(B,)` are equal."""
    return len(groups[has_equal_scores(scores, groups)].unique())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _means(values: Sequence[float | None], groups: Sequence[str | int]) -> dict[str, float | None]:
    """Mean of each group that has a value, in the order of the groups' names or numbers."""
    members: dict[str | int, list[float | None]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            members.setdefault(group, []).append(value)
    return {str(group): _mean(members[group]) for group in sorted(members, key=lambda x: (str(type(x)), x))}
