"""The demonstration's baselines: each trained on the same samples with the same budget, then audited the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from exitsafe.baselines import default_layer_ppo, sft
from exitsafe.cli import console
from exitsafe.cli.audit_command import run_audit
from exitsafe.cli.models import load_model
from exitsafe.data.source import find_samples
from exitsafe.lppo import LPPOConfig
from exitsafe.results.run import AuditRun
from exitsafe.specs.inputs import FullLoading
from exitsafe.specs.verbs import AuditSpec

BASELINES: Mapping[str, tuple[str, Callable[..., Path]]] = {
    "PPO at the default exit": ("ppo-default", default_layer_ppo),
    "SFT on refusals": ("sft-refusals", partial(sft, with_benign=False)),
    "SFT with benign data": ("sft-benign", partial(sft, with_benign=True)),
}
"""Label in the chart -> name of the folder, how it is trained."""


def run_baselines(audit: AuditSpec, *, out: Path) -> dict[str, AuditRun]:
    """Train and audit each: `out/baseline-NAME/train`, `out/baseline-NAME/after`.

    Args:
        audit: How the demonstration audits.
        out: The demonstration's folder.
    """
    samples = find_samples(audit.model, audit.samples, split="train", seed=audit.seed).read()
    config = LPPOConfig.for_organism(seed=audit.seed)
    vlm = load_model(audit.model)
    runs = {}
    for label, (name, train) in BASELINES.items():
        folder = out / f"baseline-{name}"
        with console.progress_bar(f"Baseline: {label}", unit="step") as progress:
            adapter = train(vlm, samples, config=config, out=folder / "train", progress=progress)
        runs[label] = run_audit(with_adapter(audit, adapter, out=folder / "after"), title=f"Audit: {label}")
    return runs


def with_adapter(audit: AuditSpec, adapter: Path, *, out: Path) -> AuditSpec:
    """The same audit of the repaired model."""
    return audit.model_copy(update={"out": out, "loading": FullLoading(adapter=str(adapter))})
