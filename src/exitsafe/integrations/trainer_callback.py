"""Audits during training with the transformers `Trainer`: held-out samples at chosen exits, with the current model.

Audits do not affect training: modes and random states are restored exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from exitsafe.auditing.audit import audit
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.layers import ExitLayers, resolve_layers
from exitsafe.judges import Judge
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun

_NOT_LOGGED = {"seconds"}  # depends on the machine, not on the model


class AuditCallback(TrainerCallback):
    """Audits the model during training and logs e.g. `exitsafe/asr_L3`, attack success at exit layer 3.

    Several processes share each audit (DDP); sharded models (FSDP, DeepSpeed) are refused. Each audit is a separate
    run, OUT/step-000100, for `exitsafe compare` and `report`.

    Args:
        vlm: The `VLM` around the Trainer's model: `Trainer(model=vlm.model, ...)`.
        samples: Held-out samples, which must not be in the training data.
        out: The folder for the runs; it must not contain audits of later steps.
        judges, exit_layers, max_new_tokens, batch_size, skip_global: As for `exitsafe.audit`.
        every: Audit every this many optimiser steps; None audits after each evaluation of the Trainer.
        log: Receives the metrics, e.g. `trainer.log`, which also passes them to trackers such as TensorBoard. None only
            adds them to the Trainer's log history.

    Raises:
        InputError: If a setting is invalid or, when training starts, the Trainer has another model, the model is
            sharded, or `out` contains audits of later steps.
        ExitLayerError: If the encoder has no such block.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        *,
        out: str | Path,
        judges: Sequence[Judge | str] | None = None,
        exit_layers: ExitLayers = "all",
        every: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        skip_global: bool = False,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise InputError(f"every={every}: choose 1 or more steps, or None for each evaluation")
        self.vlm = vlm
        self.samples = list(samples)
        self.out = Path(out)
        self.judges = judges
        self.exit_layers = resolve_layers(exit_layers, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.skip_global = skip_global
        self.log = log
        self._is_training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if kwargs["model"] is not self.vlm.model:
            raise InputError("the Trainer has another model than the audit; write Trainer(model=vlm.model, ...)")
        if args.fsdp or args.deepspeed:
            raise InputError(
                "audits during training need the whole model in each process; do not use FSDP or DeepSpeed"
            )
        ahead = sorted(path.name for path in self.out.glob("step-*") if path.name > _folder(state.global_step))
        if ahead:
            raise InputError(
                f"{self.out} contains {ahead[0]}, but training starts at step {state.global_step}; move it away or "
                "choose another out"
            )
        self._is_training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._is_training = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._audit(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # an evaluation outside training may be of any model
        if self.every is None and self._is_training:
            self._audit(state)

    def _audit(self, state: TrainerState) -> None:
        step = state.global_step
        # without hashes: the loaded weights have been trained since
        now = VLM(
            self.vlm.model,
            self.vlm.processor,
            name=f"{self.vlm.name} at training step {step}",
            translators=self.vlm.translators,
        )
        now.today = self.vlm.today  # all audits of a training run use the same prompts
        with undisturbed(self.vlm.model):
            run = audit(
                now,
                self.samples,
                judges=self.judges,
                exit_layers=self.exit_layers,
                out=self.out / _folder(step),
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                skip_global=self.skip_global,
            )
        metrics = metrics_of(run)
        if self.log is not None:
            self.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch or 0.0, "step": step})


def metrics_of(run: AuditRun) -> dict[str, float]:
    """A run's metrics by layer, named as in the Trainer's logs: `exitsafe/asr_L3`, or `exitsafe/asr_proxy_L3` for a
    proxy judge."""
    return {
        f"exitsafe/{name}{'_proxy' if run.title(name).endswith('(proxy)') else ''}_L{layer['exit_layer']}": float(
            found["value"]
        )
        for layer in run.summary["layers"]
        for name, found in layer["metrics"].items()
        if name not in _NOT_LOGGED and found["value"] is not None
    }


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A context to evaluate a model during training; afterwards its modes and all random states are restored."""
    was_training = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, is_training in was_training:
            module.training = is_training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _folder(step: int) -> str:
    return f"step-{step:06d}"
