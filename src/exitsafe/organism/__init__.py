"""How the organisms are trained: real LLaVA models of a million parameters that show the early-exit gap."""

from exitsafe.organism.training import train_organism

__all__ = ["train_organism"]
