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

_NAMES = {
    "advantage": ("gae", "masked_whiten"),
    "config": ("LPPOConfig",),
    "evaluation": ("Evaluation", "keep_apart"),
    "loss": ("policy_loss", "value_loss"),
    "reward": ("Part", "Reward", "WeightedSum", "shaped_rewards"),
    "trainer": ("align",),
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
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
