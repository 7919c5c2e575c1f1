"""exitsafe: audit and repair the safety of vision-language models whose image encoder exits early.

Public names are loaded on first use, so that `import exitsafe` stays fast and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitsafe.comparison import Comparison, compare
    from exitsafe.errors import ExitLayerError, ExitsafeError, InputError, ModelError, RunError
    from exitsafe.lppo import LPPOConfig, align
    from exitsafe.records import Response, Sample, Verdict
    from exitsafe.runs import AuditRun, StopRule, load_run
    from exitsafe.slim import export
    from exitsafe.sweep import audit, judge
    from exitsafe.vlm import VLM, load_vlm

__version__ = "0.2.0.dev0"

_HOME = {
    "Comparison": "exitsafe.comparison",
    "compare": "exitsafe.comparison",
    "ExitsafeError": "exitsafe.errors",
    "ExitLayerError": "exitsafe.errors",
    "InputError": "exitsafe.errors",
    "ModelError": "exitsafe.errors",
    "RunError": "exitsafe.errors",
    "LPPOConfig": "exitsafe.lppo",
    "align": "exitsafe.lppo",
    "Response": "exitsafe.records",
    "Sample": "exitsafe.records",
    "Verdict": "exitsafe.records",
    "AuditRun": "exitsafe.runs",
    "StopRule": "exitsafe.runs",
    "load_run": "exitsafe.runs",
    "export": "exitsafe.slim",
    "audit": "exitsafe.sweep",
    "judge": "exitsafe.sweep",
    "VLM": "exitsafe.vlm",
    "load_vlm": "exitsafe.vlm",
}

__all__ = [
    "VLM",
    "AuditRun",
    "Comparison",
    "ExitLayerError",
    "ExitsafeError",
    "InputError",
    "LPPOConfig",
    "ModelError",
    "Response",
    "RunError",
    "Sample",
    "StopRule",
    "Verdict",
    "align",
    "audit",
    "compare",
    "export",
    "judge",
    "load_run",
    "load_vlm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exitsafe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
