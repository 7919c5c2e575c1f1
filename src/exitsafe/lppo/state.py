"""Everything that a training carries from step to step, and how it is saved and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from exitsafe.engine.prompts import Row
from exitsafe.lppo.batch_sizes import BatchSizes, KeptSizes
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.constraints import Constraints, ConstraintState
from exitsafe.lppo.evaluation import EvaluatorState
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.kl import adapted_kl_coef
from exitsafe.lppo.metrics import Totals
from exitsafe.lppo.parallel import Team
from exitsafe.lppo.policy import Policy
from exitsafe.lppo.reward import Score
from exitsafe.lppo.rollout import Trajectory, rollout
from exitsafe.lppo.sampler import Schedule
from exitsafe.lppo.scorer import Scorer
from exitsafe.lppo.update import Learner
from exitsafe.records import Sample


class Checkpoint(TypedDict):
    """All that the next step depends on beside the settings. Schedule and learning rates follow from these and the
    step's number."""

    weights: dict[str, Tensor]
    value_head: dict[str, Tensor]
    optimizer: dict[str, Any]  # as torch types it
    value_optimizer: dict[str, Any]
    kl_coef: float
    constraints: ConstraintState
    totals: dict[str, int]
    calibration: list[tuple[float, float]]
    batch_sizes: KeptSizes
    rng: list[Tensor]  # torch's random state in each process, for rewards that draw
    evaluation: NotRequired[EvaluatorState]


@dataclass(kw_only=True, eq=False)
class TrainingState:
    """The policy with its optimisers, the coefficients that adapt, and what the steps read."""

    policy: Policy
    samples: Sequence[Sample]
    exit_layers: Sequence[int]
    schedule: Schedule
    features: FeatureStore
    scorer: Scorer
    config: LPPOConfig
    sizes: BatchSizes
    team: Team

    def __post_init__(self) -> None:
        self.vlm = self.policy.vlm
        self.learner = Learner(self.policy, self.config, self.team)
        self.kl_coef = self.config.kl_coef
        self.constraints = Constraints(self.config)
        self.totals = Totals()

    def own_places(self, count: int) -> list[int]:
        """Which of `count` places are this process's share; groups stay whole."""
        return self.team.places(count, group_size=self.config.group_size)

    def rollout(self, samples: Sequence[Sample], rows: Sequence[Row], *, draw: int) -> list[Trajectory]:
        """One answer per row from the policy as it is, shared by all processes."""
        return rollout(
            self.vlm, samples, rows, config=self.config, draw=draw, team=self.team, batch_size=self.sizes.rollout
        )

    def score(self, answers: Sequence[Trajectory]) -> list[Score]:
        """A score for each answer, shared by all processes."""
        own = self.own_places(len(answers))
        scores = self.scorer([answers[i].sample for i in own], [answers[i].response for i in own])
        return self.team.merge(dict(zip(own, scores, strict=True)))

    def adapt(self, *, kl: float, costs: Mapping[str, float | None]) -> None:
        """Move the KL coefficient and the constraints' multipliers by what a step measured."""
        config = self.config
        if config.kl_target is not None:
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=config.kl_target, initial=config.kl_coef)
        self.constraints.ascend(costs)

    def checkpoint(self) -> Checkpoint:
        """For `restore`. All processes must call it."""
        return {
            "weights": self.policy.weights(),
            "value_head": self.policy.value_head.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "value_optimizer": self.learner.value_optimizer.state_dict(),
            "kl_coef": self.kl_coef,
            "constraints": self.constraints.state(),
            "totals": asdict(self.totals),
            "calibration": self.scorer.calibration,
            "batch_sizes": self.sizes.state(),
            "rng": self.team.gather(torch.get_rng_state()),
        }

    def restore(self, saved: Checkpoint) -> None:
        """Continue from what `checkpoint` returned."""
        self.policy.load_weights(saved["weights"])
        self.policy.value_head.load_state_dict(saved["value_head"])
        self.learner.optimizer.load_state_dict(saved["optimizer"])
        self.learner.value_optimizer.load_state_dict(saved["value_optimizer"])
        self.kl_coef = saved["kl_coef"]
        self.constraints.load_state(saved["constraints"])
        self.totals = Totals(**saved["totals"])
        self.scorer.calibration = [(mean, deviation) for mean, deviation in saved["calibration"]]
        self.sizes.load_state(saved["batch_sizes"])
        torch.set_rng_state(saved["rng"][self.team.number % len(saved["rng"])].cpu())
