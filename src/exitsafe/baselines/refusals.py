"""Supervised fine-tuning on refusals, each sample at a random exit layer. Is reinforcement learning needed?

Harmful samples are trained on a refusal. With benign data, all others are trained on their reference answer or, if
there is none, the untrained model's own greedy answer at the default exit. Schedule, adapter, minibatches and folder
are L-PPO's; a cross-entropy replaces rollouts, rewards and clipped losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, RunError
from exitsafe.exits.finite import check_finite
from exitsafe.lppo.batch_sizes import BatchSizes
from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.folder import METRICS, TrainingFolder, run_settings, warn_of_audited
from exitsafe.lppo.metrics import PATIENCE_STEPS
from exitsafe.lppo.minibatches import Batch, Passes, deal
from exitsafe.lppo.parallel import ALONE
from exitsafe.lppo.policy import attached_policy, check_trainable
from exitsafe.lppo.sampler import Schedule, draw_schedule, trained_exits, warn_of_harmful_only
from exitsafe.lppo.update import Learner
from exitsafe.records import Progress, Sample
from exitsafe.store.fingerprint import pin_today
from exitsafe.world.profile import WORLD, is_world

DEFAULT_CONFIG = LPPOConfig()
REFUSAL = "I'm sorry, but I can't help with that."


def sft(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    with_benign: bool,
    refusal: str | None = None,
    config: LPPOConfig = DEFAULT_CONFIG,
    out: str | Path,
    progress: Progress | None = None,
) -> Path:
    """Fine-tune on refusals at random exits.

    Resuming and the state of the model afterwards are as with `align`, but a signal loses the steps since the last
    checkpoint.

    Args:
        vlm: The model; it must not carry an adapter.
        samples: As for `align`.
        with_benign: False leaves out all samples that are not harmful, which shows over-refusal.
        refusal: The answer to harmful samples; None takes "I'm sorry, but I can't help with that.", or the organism's
            own refusal.
        config: Used are exits, adapter, seed, `num_steps`, sizes of batches and minibatches (one optimiser step
            each), `mix` (only with benign data), `max_new_tokens` (of the model's own answers), `learning_rate` and its
            decay, `max_grad_norm`, checkpoints.
        out: Folder for settings, metrics, checkpoints and adapter.
        progress: Called after each step.

    Returns:
        The PEFT adapter's folder, `out/adapter`.

    Raises:
        InputError: If there is nothing to train on, an answer is not in the model's vocabulary or is too
            long for its context, or the weights are float16.
        RunError: If `out` holds another run, or no gradient is finite.
    """
    kept = tuple(sample for sample in samples if with_benign or sample.kind == "harmful")
    if not kept:
        raise InputError("no harmful samples to learn refusals from: add some, or train with benign data")
    config = replace(config, temperature=1.0)  # cross-entropy is of the distribution itself
    if not with_benign:
        config = replace(config, mix=None)
    refusal = refusal or (WORLD.refusal if is_world(kept[:1]) else REFUSAL)
    exit_layers = trained_exits(config, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    schedule = draw_schedule(kept, exit_layers, config)
    check_trainable(vlm, config)
    pin_today(vlm, out)
    settings, recorded = run_settings("sft", vlm, kept, exit_layers, config)
    folder = TrainingFolder.open(Path(out), settings | {"refusal": refusal}, recorded)
    if folder.is_finished:
        return folder.adapter
    if with_benign:
        warn_of_harmful_only(kept, config)
    warn_of_audited(kept, Path(out))
    sizes = BatchSizes(config)
    targets = _targets(vlm, kept, refusal, config, sizes)
    features = FeatureStore(vlm, kept, exit_layers, max_bytes=config.feature_cache_gb * 1e9)
    with folder.locked(), attached_policy(vlm, config) as policy:
        _train(Learner(policy, config), schedule, features, targets, sizes, folder, progress)
        folder.save_adapter(policy.save, trained_on=kept)
    return folder.adapter


def _train(
    learner: Learner,
    schedule: Schedule,
    features: FeatureStore,
    targets: Sequence[Tensor],
    sizes: BatchSizes,
    folder: TrainingFolder,
    progress: Progress | None,
) -> None:
    """Do all steps that are not done yet."""
    config, vlm = learner.config, learner.policy.vlm
    skipped_in_a_row = 0
    for step in range(_resume(folder, learner, sizes), config.num_steps):
        started = time.perf_counter()
        indices = schedule.sample_indices[step].tolist()
        rows = features.rows(indices, schedule.exit_layers[step].tolist())
        rng = np.random.default_rng((config.seed, 4, step))
        answers = [targets[i] for i in indices]
        batch = deal(vlm, rows, answers, config=config, rng=rng, microbatch=sizes.microbatch)
        learning_rate, _ = learner.set_learning_rates(step)
        fitted = _fit(learner, batch)
        sizes.agree(step)
        seconds = time.perf_counter() - started
        folder.append(METRICS, {"step": step, **asdict(fitted), "learning_rate": learning_rate, "seconds": seconds})
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
            save_checkpoint(folder.checkpoints, step + 1, _checkpoint(learner, sizes))
        if progress is not None:
            note = "every minibatch skipped" if fitted.loss is None else f"loss {fitted.loss:.3f}"
            progress(step + 1, config.num_steps, note)
        skipped_in_a_row = skipped_in_a_row + 1 if fitted.loss is None else 0
        if skipped_in_a_row == min(PATIENCE_STEPS, config.num_steps):
            raise RunError(
                f"stopped after step {step + 1} of {config.num_steps}: no gradient of the last {skipped_in_a_row} "
                "steps was finite; lower learning_rate, or load the model in bfloat16 or float32. Metrics and "
                f"checkpoints are kept in {folder.path}"
            )


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """Means over the optimiser steps of one step that were not skipped; None if all were."""

    loss: float | None
    grad_norm: float | None
    skipped_minibatches: int


def _fit(learner: Learner, batch: Batch) -> _Fitted:
    """One optimiser step per minibatch on the mean cross-entropy of its target tokens, where the gradient is finite."""
    losses, norms = [], []
    for index in range(len(batch.minibatches)):
        total = batch.in_passes(index, ALONE, partial(_add_up, learner, batch, index))
        norm = torch.nn.utils.clip_grad_norm_(learner.weights, learner.config.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(total):
            learner.optimizer.step()
            losses.append(total)
            norms.append(norm)
        learner.drop_gradients()
    return _Fitted(
        loss=fmean(losses) if losses else None,
        grad_norm=fmean(norms) if norms else None,
        skipped_minibatches=len(batch.minibatches) - len(losses),
    )


def _add_up(learner: Learner, batch: Batch, index: int, passes: Passes) -> float:
    """Accumulate the gradients of a minibatch from zero. Returns the loss."""
    learner.drop_gradients()
    num_tokens = sum(len(batch.responses[i]) for part in batch.minibatches[index] for i in part)
    total = 0.0
    for part, _ in passes:
        rows = [batch.rows[i] for i in part]
        now = learner.policy.evaluate(rows, [batch.responses[i] for i in part])
        check_finite(now.logprobs, rows, what="log-probabilities", dtype=learner.policy.vlm.base_model.dtype)
        loss = -now.logprobs.sum() / num_tokens  # zero outside the mask
        loss.backward()
        total += loss.item()
    return total


def _checkpoint(learner: Learner, sizes: BatchSizes) -> dict[str, object]:
    weights, optimizer = learner.policy.weights(), learner.optimizer.state_dict()
    return {"weights": weights, "optimizer": optimizer, "batch_sizes": sizes.state()}


def _resume(folder: TrainingFolder, learner: Learner, sizes: BatchSizes) -> int:
    """Restore the newest whole checkpoint, if there is one. Returns the number of steps done."""
    step, found = 0, load_checkpoint(folder.checkpoints, learner.policy.vlm.device)
    if found is not None:
        step, saved = found
        learner.policy.load_weights(saved["weights"])
        learner.optimizer.load_state_dict(saved["optimizer"])
        sizes.load_state(saved["batch_sizes"])
    folder.drop_lines_from(step)
    return step


def _targets(vlm: VLM, samples: Sequence[Sample], refusal: str, config: LPPOConfig, sizes: BatchSizes) -> list[Tensor]:
    """Token ids to learn for each sample."""
    texts = [refusal if sample.kind == "harmful" else next(iter(sample.answers), None) for sample in samples]
    own = _own_answers(vlm, [s for s, text in zip(samples, texts, strict=True) if text is None], config, sizes)
    return [
        own[sample.id] if text is None else _encode(vlm, sample, text, config)
        for sample, text in zip(samples, texts, strict=True)
    ]


def _encode(vlm: VLM, sample: Sample, text: str, config: LPPOConfig) -> Tensor:
    ids: list[int] = vlm.tokenizer.encode(text, add_special_tokens=False)
    if set(ids) & set(vlm.special_token_ids):
        raise InputError(f"sample {sample.id}: its answer has words outside the model's vocabulary; change it")
    target = torch.tensor([*ids, vlm.turn_end_token_id])
    if len(target) > config.max_new_tokens:  # references are not truncated, so a long one needs more room
        vlm.read_ahead([sample], max_new_tokens=len(target))
    return target


def _own_answers(vlm: VLM, samples: Sequence[Sample], config: LPPOConfig, sizes: BatchSizes) -> dict[str, Tensor]:
    """Greedy answers at the default exit, before any training, by sample id."""
    answers: dict[str, Tensor] = {}
    for start in range(0, len(samples), config.rollout_batch_size):
        prompts = [vlm.encode_prompt(sample) for sample in samples[start : start + config.rollout_batch_size]]
        features = vlm.prompt_features(prompts, (vlm.default_exit,))
        rows = [
            Row(prompt=prompt, exit_layer=vlm.default_exit, features=found[vlm.default_exit])
            for prompt, found in zip(prompts, features, strict=True)
        ]
        completions = vlm.complete(
            rows,
            max_new_tokens=config.max_new_tokens,
            temperature=0.0,
            seed=config.seed,
            batch_size=sizes.rollout,
            suppress=vlm.special_token_ids,
        )
        for index, completion in completions:
            answers[prompts[index].sample_id] = torch.tensor(completion.token_ids)
    return answers
