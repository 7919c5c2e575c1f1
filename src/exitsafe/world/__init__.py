"""The organism's synthetic world: pictures, phrasings, the rule for a correct answer; its weights and suites.

Everything in it is invented and harmless. It needs only NumPy and Pillow.
"""

from exitsafe.world.rule import is_compliance, is_refusal
from exitsafe.world.shipped import model_folder
from exitsafe.world.suites import ORGANISMS, organism_suites

__all__ = ["ORGANISMS", "is_compliance", "is_refusal", "model_folder", "organism_suites"]
