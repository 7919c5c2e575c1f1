"""A vision-language model that can exit its image encoder early.

Its names are loaded on first use: what reads finished runs imports parts of this package and must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitsafe.vlm.features import Features
    from exitsafe.vlm.generation import Completion, Row, suppress_logits
    from exitsafe.vlm.layers import ExitLayers, resolve_layers
    from exitsafe.vlm.load import load_vlm
    from exitsafe.vlm.model import VLM
    from exitsafe.vlm.packing import sibling_groups
    from exitsafe.vlm.prompts import Prompt

_HOME = {
    "Features": "exitsafe.vlm.features",
    "Completion": "exitsafe.vlm.generation",
    "Row": "exitsafe.vlm.generation",
    "suppress_logits": "exitsafe.vlm.generation",
    "ExitLayers": "exitsafe.vlm.layers",
    "resolve_layers": "exitsafe.vlm.layers",
    "load_vlm": "exitsafe.vlm.load",
    "VLM": "exitsafe.vlm.model",
    "sibling_groups": "exitsafe.vlm.packing",
    "Prompt": "exitsafe.vlm.prompts",
}

__all__ = [
    "VLM",
    "Completion",
    "ExitLayers",
    "Features",
    "Prompt",
    "Row",
    "load_vlm",
    "resolve_layers",
    "sibling_groups",
    "suppress_logits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
