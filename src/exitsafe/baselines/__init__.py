"""What L-PPO must beat: PPO at the default exit alone, and fine-tuning on refusals at random exits."""

from exitsafe.baselines.default_layer import default_layer_ppo
from exitsafe.baselines.refusals import sft

__all__ = ["default_layer_ppo", "sft"]
