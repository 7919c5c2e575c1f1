"""The demonstration's baselines: each trained on the same samples with the same budget, then audited the same way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitsafe.cli import console
from exitsafe.cli.audit_command import run_audit
from exitsafe.cli.models import load_model
from exitsafe.data.source import find_samples
from exitsafe.lppo import LPPOConfig, align
from exitsafe.results.run import AuditRun
from exitsafe.specs.inputs import FullLoading
from exitsafe.specs.verbs import AuditSpec

BASELINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "PPO at the default exit": ("ppo-default", {"exit_layers": "default"}),
    "SFT on refusals": ("sft-refusals", {"method": "sft", "mix": {"harmful": 1.0}}),
    "SFT with benign data": ("sft-benign", {"method": "sft"}),
}
"""Label in the chart -> name of the folder, and what differs from the organism's settings."""


def run_baselines(audit: AuditSpec, *, out: Path) -> dict[str, AuditRun]:
    """Train and audit each: `out/baseline-NAME/train`, `out/baseline-NAME/after`.

    Args:
        audit: How the demonstration audits.
        out: The demonstration's folder.
    """
    samples = find_samples(audit.model, audit.samples, split="train", seed=audit.seed).read()
    vlm = load_model(audit.model)
    runs = {}
    for label, (name, changes) in BASELINES.items():
        folder = out / f"baseline-{name}"
        config = LPPOConfig.for_organism(seed=audit.seed, **changes)
        with console.progress_bar(f"Baseline: {label}", unit="step") as progress:
            adapter = align(vlm, samples, config=config, out=folder / "train", progress=progress)
        runs[label] = run_audit(with_adapter(audit, adapter, out=folder / "after"), title=f"Audit: {label}")
    return runs


def with_adapter(audit: AuditSpec, adapter: Path, *, out: Path) -> AuditSpec:
    """The same audit of the repaired model."""
    return audit.model_copy(update={"out": out, "loading": FullLoading(adapter=str(adapter))})
