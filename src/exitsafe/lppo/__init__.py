"""Layer-wise PPO: align a model at many exit layers of its image encoder. `trainer.py` is the place to start."""

from exitsafe.lppo.advantage import gae, masked_whiten
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.loss import policy_loss, value_loss
from exitsafe.lppo.reward import Reward, shaped_rewards
from exitsafe.lppo.trainer import align

__all__ = [
    "LPPOConfig",
    "Reward",
    "align",
    "gae",
    "masked_whiten",
    "policy_loss",
    "shaped_rewards",
    "value_loss",
]
