"""exitsafe: audit and repair the safety of vision-language models whose image encoder exits early.

Public names are loaded on first use, so that `import exitsafe` stays fast and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitsafe.auditing.audit import audit, judge
    from exitsafe.engine.load import load_vlm
    from exitsafe.engine.vlm import VLM
    from exitsafe.errors import ExitLayerError, ExitsafeError, InputError, ModelError, RunError
    from exitsafe.exporting.export import export
    from exitsafe.lppo import LPPOConfig, align
    from exitsafe.records import Response, Sample, Verdict
    from exitsafe.results.comparison import Comparison, compare
    from exitsafe.results.run import AuditRun, load_run
    from exitsafe.specs.verbs import StopRule

from exitsafe.version import __version__

_HOME = {
    "Comparison": "exitsafe.results.comparison",
    "compare": "exitsafe.results.comparison",
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
    "AuditRun": "exitsafe.results.run",
    "StopRule": "exitsafe.specs.verbs",
    "load_run": "exitsafe.results.run",
    "export": "exitsafe.exporting.export",
    "audit": "exitsafe.auditing.audit",
    "judge": "exitsafe.auditing.audit",
    "VLM": "exitsafe.engine.vlm",
    "load_vlm": "exitsafe.engine.load",
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
    "__version__",
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
