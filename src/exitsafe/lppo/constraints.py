"""Limits that training must keep while it maximises the score: Lagrange multipliers.

Judges give the costs of an answer. Each cost has a multiplier, which rises while the cost is above its limit and falls
to 0 while it is below. The score that is trained on is (score - sum of multiplier * cost) / (1 + sum of multipliers):
PPO-Lagrangian (Ray et al. 2019, "Benchmarking Safe Exploration in Deep Reinforcement Learning") with the normalisation
of Safe RLHF (Dai et al. 2023, arXiv 2310.12773), which preserves the scale of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from exitsafe.errors import InputError, RunError
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.reward import Score
from exitsafe.records import Kind, Sample

KINDS_OF: dict[str, tuple[Kind, ...]] = {"over_refusal": ("borderline", "benign"), "utility": ("vqa",)}
"""The samples on which each cost is measured."""
MAX_MULTIPLIER = 10.0
"""Multipliers stop here: a limit that cannot be kept leaves the score a weight of at least 1/11 (1/21 for two)."""

Costs = dict[str, list[float | None]]
"""By constraint, the cost of each answer; None where it has none."""


class ConstraintState(TypedDict):
    """What a checkpoint keeps."""

    multipliers: dict[str, float]
    reference_errors: dict[int, float]


class Constraints:
    """The constraints of a run with their multipliers. Without constraints every method leaves scores as they are.

    over_refusal: the share of borderline and benign samples that are refused, at most the limit.
    utility: the share of picture questions answered wrongly minus the untrained model's share at the same exits, at
    most the limit. (The untrained model may already exceed a limit on the share itself.)
    """

    def __init__(self, config: LPPOConfig) -> None:
        self.limits: dict[str, float] = dict((config.constraints or {}).items())
        self.rate = config.constraint_rate
        self.multipliers = dict.fromkeys(self.limits, 0.0)
        self.reference_errors: dict[int, float] = {}

    @property
    def needs_reference(self) -> bool:
        return "utility" in self.limits

    def costs(self, samples: Sequence[Sample], scores: Sequence[Score]) -> Costs:
        """The costs of each answer, from 0 to 1."""
        found: Costs = {}
        for name in self.limits:
            costs = [_COST_OF[name](score) for score in scores]
            kinds = KINDS_OF[name]
            found[name] = [c if s.kind in kinds else None for s, c in zip(samples, costs, strict=True)]
        return found

    def penalised(self, scores: Tensor, costs: Costs) -> Tensor:
        """Scores minus their costs times the multipliers, on the scale of the scores, `(B,)`."""
        total = sum(self.multipliers.values())
        if total == 0:
            return scores
        for name, multiplier in self.multipliers.items():
            scores = scores - multiplier * torch.tensor([cost or 0.0 for cost in costs[name]])
        return scores / (1.0 + total)

    def measure(self, costs: Costs, exit_layers: Sequence[int]) -> dict[str, float | None]:
        """Each constraint's cost over a step's answers; None where no answer had one."""
        measured: dict[str, float | None] = {}
        for name in self.limits:
            known = [(c, layer) for c, layer in zip(costs[name], exit_layers, strict=True) if c is not None]
            excess = [c - (self.reference_errors[layer] if name == "utility" else 0.0) for c, layer in known]
            measured[name] = sum(excess) / len(excess) if excess else None
        return measured

    def ascend(self, measured: Mapping[str, float | None]) -> None:
        """Dual ascent: each multiplier moves by rate * (cost - limit), and stays from 0 to the maximum."""
        for name, cost in measured.items():
            if cost is not None:
                moved = self.multipliers[name] + self.rate * (cost - self.limits[name])
                self.multipliers[name] = min(max(moved, 0.0), MAX_MULTIPLIER)

    def metrics(self, measured: Mapping[str, float | None]) -> dict[str, dict[str, float | None]]:
        """For the step's line: the measured costs, and the multipliers that applied."""
        return {"costs": dict(measured), "multipliers": dict(self.multipliers)} if self.limits else {}

    def set_reference(self, costs: Sequence[float | None], exit_layers: Sequence[int]) -> None:
        """Set the untrained model's share of wrong answers at each exit, which utility is measured against.

        Args:
            costs: Of its answers to picture questions; None where one was not judged.
            exit_layers: Of the answers; among them every trained exit.

        Raises:
            RunError: If no answer was judged.
        """
        by_exit: dict[int, list[float]] = {}
        for cost, layer in zip(costs, exit_layers, strict=True):
            if cost is not None:
                by_exit.setdefault(layer, []).append(cost)
        known = [cost for found in by_exit.values() for cost in found]
        if not known:
            raise RunError("no answer of the untrained model to a picture question could be judged; check the reward")
        overall = sum(known) / len(known)  # for an exit without a judged answer
        self.reference_errors = {
            layer: sum(by_exit[layer]) / len(by_exit[layer]) if layer in by_exit else overall
            for layer in sorted(set(exit_layers))
        }

    def state(self) -> ConstraintState:
        """For the checkpoint."""
        return {"multipliers": dict(self.multipliers), "reference_errors": dict(self.reference_errors)}

    def load_state(self, state: ConstraintState) -> None:
        """Continue from what `state` returned."""
        self.multipliers, self.reference_errors = dict(state["multipliers"]), dict(state["reference_errors"])


def check_constraints(
    config: LPPOConfig, samples: Sequence[Sample], exit_layers: Sequence[int], *, reward: str, gives_costs: bool
) -> None:
    """Raise InputError if a cost cannot be measured with this reward, these samples or so few answers."""
    if not config.constraints:
        return
    if config.constraint_samples < len(exit_layers):
        raise InputError(
            f"constraint_samples={config.constraint_samples} is fewer than the {len(exit_layers)} trained exits: "
            "give at least one to each"
        )
    if not gives_costs:
        raise InputError(
            f"constraints need to know which answers were refusals or correct, and reward {reward} does not measure "
            "that: add a part that does, such as built-in or a judge that measures refusal, or set constraints to none"
        )
    drawn = {sample.kind for sample in samples if config.mix is None or config.mix.get(sample.kind, 0) > 0}
    for name in config.constraints:
        if not drawn & set(KINDS_OF[name]):
            raise InputError(
                f"the constraint {name} is measured on {' and '.join(KINDS_OF[name])} samples, but none is drawn: "
                "add some, or remove the constraint"
            )


def _over_refusal(score: Score) -> float | None:
    return score.refusal


def _utility(score: Score) -> float | None:
    return None if score.vqa_accuracy is None else 1.0 - score.vqa_accuracy


_COST_OF = {"over_refusal": _over_refusal, "utility": _utility}


def every_pair(questions: Sequence[int], exit_layers: Sequence[int], num: int) -> tuple[list[int], list[int]]:
    """`num` questions with exits: questions and exits in turn, shifted by one after every pass over the questions, so
    that no exit always gets the same questions.

    >>> every_pair([7, 8], [1, 2], 4)
    ([7, 8, 7, 8], [1, 2, 2, 1])
    """
    places = [divmod(place, len(questions)) for place in range(num)]
    exits = [exit_layers[(index + number) % len(exit_layers)] for number, index in places]
    return [questions[index] for _, index in places], exits
