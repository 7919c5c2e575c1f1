"""Audit a model at every evaluation of the transformers Trainer: each audit is a run, OUT/step-000100.

    trainer.add_callback(AuditCallback(vlm, load_suites(["heldout.jsonl"]), Path("runs/during")))

`vlm` is around the Trainer's model, `Trainer(model=vlm.model, ...)`; with LoRA, wrap the model first:
`exitsafe.VLM(get_peft_model(vlm.model, config), vlm.processor, name="mine")`. Not for FSDP or DeepSpeed, under which no
process has the whole model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

import exitsafe


class AuditCallback(TrainerCallback):
    def __init__(self, vlm: exitsafe.VLM, samples: Sequence[exitsafe.Sample], out: Path) -> None:
        self.vlm, self.samples, self.out = vlm, samples, out

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **given: Any) -> None:
        name = f"step-{state.global_step:06d}"
        # another VLM around the same model, without hashes: the loaded weights have been trained since
        now = exitsafe.VLM(self.vlm.model, self.vlm.processor, name=f"{self.vlm.name} at {name}")
        with torch.random.fork_rng(), torch.no_grad():  # training draws the same numbers as without audits
            run = exitsafe.audit(now, self.samples, out=self.out / name)
        state.log_history.append({f"asr_L{layer['exit_layer']}": asr(layer) for layer in run.summary["layers"]})


def asr(layer: dict[str, Any]) -> float | None:
    """The attack success rate at a layer; summary.json has its interval."""
    return layer["metrics"]["asr"]["value"] if "asr" in layer["metrics"] else None
