"""A vision-language model that can exit its image encoder early."""

from exitsafe.vlm.features import Features
from exitsafe.vlm.generation import Completion, Row, suppress_logits
from exitsafe.vlm.load import load_vlm
from exitsafe.vlm.model import VLM
from exitsafe.vlm.prompts import Prompt

__all__ = ["VLM", "Completion", "Features", "Prompt", "Row", "load_vlm", "suppress_logits"]
