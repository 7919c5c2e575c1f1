"""Supervised fine-tuning on refusals, each sample at a random exit layer. Is reinforcement learning needed?

Harmful samples are taught a refusal. With benign data, all others are taught their reference answer, or, where
there is none, the untrained model's own greedy answer at the default exit. Schedule, adapter, minibatches and
folder are L-PPO's; in place of rollouts, rewards and clipped losses stands one cross-entropy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
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
from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.experience import NO_MEMORY, Batch, Passes, deal
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.folder import TrainingFolder, run_settings, warn_of_audited
from exitsafe.lppo.metrics import PATIENCE_STEPS
from exitsafe.lppo.parallel import ALONE
from exitsafe.lppo.policy import attached_policy, check_end_token, check_precision, check_trainable
from exitsafe.lppo.sampler import draw_schedule, trained_exits, warn_of_harmful_only
from exitsafe.lppo.update import Learner
from exitsafe.machine.memory import BatchSize
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

    Resuming and the state of the model afterwards are as with `align`; a signal loses the steps since the last
    checkpoint.

    Args:
        vlm: The model; it must not carry an adapter.
        samples: As for `align`.
        with_benign: False leaves out all samples that are not harmful: what over-refusal looks like.
        refusal: What to answer to harmful samples; None takes "I'm sorry, but I can't help with that.", or the
            organism's own words.
        config: Of it are read: exits, adapter, seed, `num_steps`, sizes of batches and minibatches (one optimiser
            step each), `mix` (not without benign data), `max_new_tokens` (of the model's own answers),
            `learning_rate` and its decay, `max_grad_norm`, checkpoints.
        out: Folder for settings, metrics, checkpoints and adapter.
        progress: Called after each step.

    Returns:
        The PEFT adapter's folder, `out/adapter`.

    Raises:
        InputError: If there is nothing to train on, an answer cannot be written in the model's vocabulary or is too
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
    check_end_token(vlm)
    check_precision(vlm)
    pin_today(vlm, out)
    settings, sizes = run_settings("sft", vlm, kept, exit_layers, config)
    folder = TrainingFolder.open(Path(out), settings | {"refusal": refusal}, sizes)
    if folder.is_finished:
        return folder.adapter
    if with_benign:
        warn_of_harmful_only(kept, config)
    warn_of_audited(kept, Path(out))
    targets = _targets(vlm, kept, refusal, config)
    features = FeatureStore(vlm, kept, exit_layers, max_bytes=config.feature_cache_gb * 1e9)
    with folder.locked(), attached_policy(vlm, config) as policy:
        learner = Learner(policy, config)
        first_step = _resume(folder, learner)
        folder.keep_metrics(first_step)
        skipped_in_a_row = 0
        size = BatchSize(config.microbatch_tokens, problem=NO_MEMORY)
        for step in range(first_step, config.num_steps):
            started = time.perf_counter()
            indices = schedule.sample_indices[step].tolist()
            rows = features.rows(indices, schedule.exit_layers[step].tolist())
            rng = np.random.default_rng((config.seed, 4, step))
            batch = deal(vlm, rows, [targets[i] for i in indices], config=config, rng=rng, microbatch=size)
            learning_rate, _ = learner.set_learning_rates(step)
            metrics = {"step": step} | _fit(learner, batch) | {"learning_rate": learning_rate}
            folder.add_metrics(metrics | {"seconds": time.perf_counter() - started})
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
                state = {"weights": policy.weights(), "optimizer": learner.optimizer.state_dict()}
                save_checkpoint(folder.checkpoints, step + 1, state)
            if progress is not None:
                remark = "every minibatch skipped" if metrics["loss"] is None else f"loss {metrics['loss']:.3f}"
                progress(step + 1, config.num_steps, remark)
            skipped_in_a_row = skipped_in_a_row + 1 if metrics["loss"] is None else 0
            if skipped_in_a_row == min(PATIENCE_STEPS, config.num_steps):
                raise RunError(
                    f"stopped after step {step + 1} of {config.num_steps}: no gradient of the last {skipped_in_a_row} "
                    "steps was finite; lower learning_rate, or load the model in bfloat16 or float32. Metrics and "
                    f"checkpoints are kept in {folder.path}"
                )
        folder.save_adapter(policy.save, trained_on=kept)
    return folder.adapter


def _fit(learner: Learner, batch: Batch) -> dict[str, float | None]:
    """One optimiser step per minibatch on the mean cross-entropy of its target tokens, where the gradient is finite."""
    losses, norms = [], []
    for index in range(len(batch.minibatches)):
        total = batch.in_passes(index, ALONE, partial(_add_up, learner, batch, index))
        norm = torch.nn.utils.clip_grad_norm_(learner.weights, learner.config.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(total):
            learner.optimizer.step()
            losses.append(total)
            norms.append(norm)
        learner.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": fmean(losses) if losses else None,
        "grad_norm": fmean(norms) if norms else None,
        "skipped_minibatches": len(batch.minibatches) - len(losses),
    }


def _add_up(learner: Learner, batch: Batch, index: int, passes: Passes) -> float:
    """Gradients of a minibatch, from nothing; returns the loss."""
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


def _resume(folder: TrainingFolder, learner: Learner) -> int:
    found = load_checkpoint(folder.checkpoints, learner.policy.vlm.device)
    if found is None:
        return 0
    next_step, state = found
    learner.policy.load_weights(state["weights"])
    learner.optimizer.load_state_dict(state["optimizer"])
    return next_step


def _targets(vlm: VLM, samples: Sequence[Sample], refusal: str, config: LPPOConfig) -> list[Tensor]:
    """Token ids to learn for each sample."""
    texts = [refusal if sample.kind == "harmful" else next(iter(sample.answers), None) for sample in samples]
    own = _own_answers(vlm, [s for s, text in zip(samples, texts, strict=True) if text is None], config)
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


def _own_answers(vlm: VLM, samples: Sequence[Sample], config: LPPOConfig) -> dict[str, Tensor]:
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
            batch_size=config.rollout_batch_size,
            suppress=vlm.special_token_ids,
        )
        for index, completion in completions:
            answers[prompts[index].sample_id] = torch.tensor(completion.token_ids)
    return answers
