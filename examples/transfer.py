"""Which exits does training at some exits reach? Align at several sets of exits, audit each result at all exits.

    python examples/transfer.py runs/transfer

Rerun it to resume. For a model of your own, change the constants: `load_suites(["train.jsonl"])`, `LPPOConfig()`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import exitsafe
from exitsafe.data import SUITE_NAMES, load_suites
from exitsafe.lppo import LPPOConfig

MODEL = "organism"
TRAIN_EXITS = ("1", "3", "5", "7", "all")
TRAIN = load_suites(SUITE_NAMES, split="train")
TEST = load_suites(SUITE_NAMES, split="heldout")
CONFIG = LPPOConfig.for_organism(include_default=False)  # train at exactly the exits named
METRIC = "asr"  # or over_refusal, vqa_accuracy


def main(out: Path) -> None:
    untrained = audit(out / "audit-untrained")
    print("trained at".ljust(12), *(f"exit {layer:<3}" for layer in untrained.exit_layers))
    show("nothing", untrained)
    for exits in TRAIN_EXITS:
        config = replace(CONFIG, exit_layers=exits)
        adapter = exitsafe.align(exitsafe.load_vlm(MODEL), TRAIN, config=config, out=out / f"train-{exits}")
        show(exits, audit(out / f"audit-{exits}", adapter))


def audit(out: Path, adapter: Path | None = None) -> exitsafe.AuditRun:
    return exitsafe.audit(
        exitsafe.load_vlm(MODEL, adapter=adapter), TEST, max_new_tokens=CONFIG.max_new_tokens, out=out
    )


def show(trained_at: str, run: exitsafe.AuditRun) -> None:
    """One row: the metric at every exit; summary.json has the intervals."""
    values = [layer["metrics"][METRIC]["value"] for layer in run.summary["layers"]]
    print(trained_at.ljust(12), *("none    " if value is None else f"{value:<8.1%}" for value in values))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
