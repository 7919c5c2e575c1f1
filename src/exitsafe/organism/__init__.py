"""Trains the organisms: real LLaVA models with a million parameters that show the early-exit gap."""

from exitsafe.organism.training import train_organism

__all__ = ["train_organism"]
