"""Baselines for L-PPO: PPO at the default exit alone, fine-tuning on refusals at random exits, and linear maps from
each exit's features to those of the default exit."""

from exitsafe.baselines.default_layer import default_layer_ppo
from exitsafe.baselines.refusals import sft
from exitsafe.baselines.translators import fit_translators

__all__ = ["default_layer_ppo", "fit_translators", "sft"]
