"""Layer-wise PPO: align a model at many exit layers of its image encoder. Read `step.py` first.

Its names are loaded on first use: what reads finished runs imports parts of this package and must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exitsafe.lppo.advantage import gae, masked_whiten
    from exitsafe.lppo.config import LPPOConfig
    from exitsafe.lppo.evaluation import Evaluation, keep_apart
    from exitsafe.lppo.loss import policy_loss, value_loss
    from exitsafe.lppo.reward import Part, Reward, WeightedSum, shaped_rewards
    from exitsafe.lppo.trainer import align

_HOME = {
    "gae": "exitsafe.lppo.advantage",
    "masked_whiten": "exitsafe.lppo.advantage",
    "LPPOConfig": "exitsafe.lppo.config",
    "policy_loss": "exitsafe.lppo.loss",
    "value_loss": "exitsafe.lppo.loss",
    "Reward": "exitsafe.lppo.reward",
    "shaped_rewards": "exitsafe.lppo.reward",
    "Part": "exitsafe.lppo.reward",
    "WeightedSum": "exitsafe.lppo.reward",
    "align": "exitsafe.lppo.trainer",
    "Evaluation": "exitsafe.lppo.evaluation",
    "keep_apart": "exitsafe.lppo.evaluation",
}

__all__ = [
    "Evaluation",
    "LPPOConfig",
    "Part",
    "Reward",
    "WeightedSum",
    "align",
    "gae",
    "keep_apart",
    "masked_whiten",
    "policy_loss",
    "shaped_rewards",
    "value_loss",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
