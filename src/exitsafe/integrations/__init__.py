"""Doors into other tools: any exit of a model inside inspect_ai, lmms-eval, lm-eval and the transformers Trainer.

The tools are imported when a door is used, never by `import exitsafe`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitsafe.integrations.harness import lm_eval_model
    from exitsafe.integrations.trainer_callback import AuditCallback

_HOME = {
    "AuditCallback": "exitsafe.integrations.trainer_callback",
    "lm_eval_model": "exitsafe.integrations.harness",
}

__all__ = ["AuditCallback", "lm_eval_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
