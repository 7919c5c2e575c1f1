"""A repair without training that L-PPO must beat: linear maps from the features of each exit to the default one's."""

from exitsafe.baselines.translators import fit_translators

__all__ = ["fit_translators"]
