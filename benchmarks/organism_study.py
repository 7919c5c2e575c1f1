"""The study on the organisms: before, L-PPO and its variants, and the baselines, over seeds.

    python -m benchmarks.organism_study --out runs/study [--seed 0 --seed 1 ...] [--only NAME ...] [MODEL ...]

MODEL is `organism` or `organism:text`, or a folder that `python -m exitsafe.organism` wrote. Each seed draws its own
held-out pictures and phrasings and its own training. What is done already is read, not repeated. Prints Markdown tables
for docs/log.md: rates in percent, ASR by exit layer, and rates with 95% intervals: Wilson's for one exit, the
bootstrap clustered by sample for the mean of several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exitsafe.baselines import fit_translators
from exitsafe.cli.audit_command import run_audit
from exitsafe.cli.models import load_model
from exitsafe.data.source import find_samples
from exitsafe.lppo import LPPOConfig, align
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun
from exitsafe.specs.inputs import FullLoading
from exitsafe.specs.verbs import AuditSpec

EVERY_OTHER = (1, 3, 5, 7)


REPAIRS: Mapping[str, Mapping[str, Any]] = {
    "L-PPO, all exits": {},
    "L-PPO, exits 1 3 5 7": {"exit_layers": EVERY_OTHER},
    "L-PPO, no KL": {"kl_coef": 0.0, "kl_target": None},
    "L-PPO, constrained": {"constraints": {"over_refusal": 0.02, "utility": 0.05}},
    "L-GRPO, groups of 4": {"method": "grpo", "group_size": 4},
    "L-GRPO, groups of 8, warmer": {"method": "grpo", "group_size": 8, "temperature": 1.5},
    "PPO, default exit": {"exit_layers": "default"},
    "SFT, refusals only": {"method": "sft", "mix": {"harmful": 1.0}},
    "SFT, with benign": {"method": "sft"},
}
"""By name, what differs from the organism's settings."""
TRANSLATORS = "translators, no training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["organism", "organism:text"])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--only", choices=[*REPAIRS, TRANSLATORS], action="append")
    arguments = parser.parse_args()
    for model in arguments.models:
        print(f"\n### {Path(model).name}\n\n{HEADER}")
        for seed in arguments.seed or [0, 1, 2]:
            folder = arguments.out / Path(model).name.replace(":", "-") / f"seed{seed}"
            study(model, arguments.only or [*REPAIRS, TRANSLATORS], seed=seed, out=folder)


def study(model: str, names: Sequence[str], *, seed: int, out: Path) -> None:
    """One model and seed: a row for each way to repair it."""
    audit = AuditSpec(model=model, out=out / "before", seed=seed)
    print(row(seed, "before", run_audit(audit), seconds=None, kl=None), flush=True)
    for name in names:
        folder = out / name.replace(",", "").replace(" ", "-").lower()
        seconds, kl, loading = repair(audit, name, out=folder / "train")
        after = run_audit(audit.model_copy(update={"out": folder / "after", "loading": loading}))
        print(row(seed, name, after, seconds=seconds, kl=kl), flush=True)


def repair(audit: AuditSpec, name: str, *, out: Path) -> tuple[float | None, float | None, FullLoading]:
    """Seconds it took, nats per answer from the reference at the end, and what to load the model with."""
    if name == TRANSLATORS:
        started = time.perf_counter()
        fit_translators(load_model(audit.model), training_samples(audit), out=out)
        return time.perf_counter() - started, None, FullLoading(translators=str(out))
    seconds = train(audit, LPPOConfig.for_organism(seed=audit.seed, **REPAIRS[name]), out)
    return seconds, last_kl(out), FullLoading(adapter=str(out / "adapter"))


def training_samples(audit: AuditSpec) -> list[Sample]:
    return find_samples(audit.model, audit.samples, split="train", seed=audit.seed).read()


def last_kl(out: Path) -> float | None:
    """Mean over the last ten steps of each adapter; fine-tuning does not measure it."""
    by_exit: dict[int | None, list[dict[str, Any]]] = {}  # None: one adapter for all exits
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        by_exit.setdefault(line.get("exit_layer"), []).append(line)
    lines = [line for steps in by_exit.values() for line in steps[-10:]]
    return sum(line["kl"] for line in lines) / len(lines) if "kl" in lines[0] else None


def train(audit: AuditSpec, config: LPPOConfig, out: Path) -> float:
    """Train unless done; the seconds it took are kept beside it."""
    record = out.parent / "seconds.json"
    if not record.is_file():
        samples = training_samples(audit)
        vlm = load_model(audit.model)
        started = time.perf_counter()
        align(vlm, samples, config=config, out=out)
        record.write_text(json.dumps(time.perf_counter() - started))
    return float(json.loads(record.read_text()))


COLUMNS = (
    "seed", "run", "ASR by exit", "mean ASR, other exits", "ASR, worst exit", "ASR, default",
    "over-refusal, worst exit", "over-refusal, default", "VQA, default", "VQA, worst exit", "KL", "s",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(seed: int, name: str, run: AuditRun, *, seconds: float | None, kl: float | None) -> str:
    """One line of the table."""
    default = run.summary["default_exit"]
    by_exit = {layer["exit_layer"]: layer["metrics"] for layer in run.summary["layers"]}
    others = [exit_layer for exit_layer in by_exit if exit_layer != default]
    worst = max((metrics["over_refusal"] for metrics in by_exit.values()), key=lambda rate: float(rate["value"]))
    worst_vqa = min((metrics["vqa_accuracy"] for metrics in by_exit.values()), key=lambda rate: float(rate["value"]))
    cells = [
        str(seed),
        name,
        " ".join(f"{100 * metrics['asr']['value']:.0f}" for metrics in by_exit.values()),
        rate(asdict(run.mean_over_layers("asr", others))),
        rate(max((metrics["asr"] for metrics in by_exit.values()), key=lambda rate: float(rate["value"]))),
        rate(by_exit[default]["asr"]),
        rate(worst),
        rate(by_exit[default]["over_refusal"]),
        rate(by_exit[default]["vqa_accuracy"]),
        rate(worst_vqa),
        "" if kl is None else f"{kl:.1f}",
        "" if seconds is None else f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def rate(metric: dict[str, Any]) -> str:
    return f"{100 * metric['value']:.1f} ({100 * metric['low']:.1f} to {100 * metric['high']:.1f}, n={metric['n']}" + (
        f", unscored {metric['unscored']})" if metric["unscored"] else ")"
    )


if __name__ == "__main__":
    main()
