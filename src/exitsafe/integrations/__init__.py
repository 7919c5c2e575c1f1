"""Integrations with other tools: any exit of a model in inspect_ai, lmms-eval, lm-eval and the transformers Trainer.

A tool is imported when its integration is used, never by `import exitsafe`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exitsafe.integrations.harness import lm_eval_model
    from exitsafe.integrations.trainer_callback import AuditCallback

_HOME = {
    "AuditCallback": "exitsafe.integrations.trainer_callback",
    "lm_eval_model": "exitsafe.integrations.harness",
}

__all__ = ["AuditCallback", "lm_eval_model"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_HOME[name]), name)
    return found
