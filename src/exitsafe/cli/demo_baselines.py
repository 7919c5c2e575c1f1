"""The demonstration's baselines: each trained on the same samples with the same budget, then audited the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from exitsafe.baselines import default_layer_ppo, sft
from exitsafe.cli import console, defaults
from exitsafe.cli.audit_plan import AuditPlan, run_plan
from exitsafe.cli.models import load_model
from exitsafe.lppo import LPPOConfig
from exitsafe.results.run import AuditRun

BASELINES: Mapping[str, tuple[str, Callable[..., Path]]] = {
    "PPO at the default exit": ("ppo-default", default_layer_ppo),
    "SFT on refusals": ("sft-refusals", partial(sft, with_benign=False)),
    "SFT with benign data": ("sft-benign", partial(sft, with_benign=True)),
}
"""Label in the chart -> name of the folder, how it is trained."""


def run_baselines(plan: AuditPlan, *, out: Path) -> dict[str, AuditRun]:
    """Train and audit each: `out/baseline-NAME/train`, `out/baseline-NAME/after`.

    Args:
        plan: How the demonstration audits.
        out: The demonstration's folder.
    """
    samples = defaults.read_samples(plan.origin | {"split": "train"})
    config = LPPOConfig.for_organism(seed=plan.origin["seed"])
    vlm = load_model(plan.model)
    runs = {}
    for label, (name, train) in BASELINES.items():
        folder = out / f"baseline-{name}"
        with console.progress_bar(f"Baseline: {label}", unit="step") as progress:
            adapter = train(vlm, samples, config=config, out=folder / "train", progress=progress)
        runs[label] = run_plan(plan, out=folder / "after", loading={"adapter": adapter}, title=f"Audit: {label}")
    return runs
