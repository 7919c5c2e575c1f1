"""Supervised fine-tuning at random exits: samples and exits drawn as by L-PPO, a cross-entropy in place of rollouts,
rewards and clipped losses.

Harmful samples are trained on a refusal, all others on their first reference answer or, if there is none, on the
untrained model's own greedy answer at the default exit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.finite import check_finite
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.metrics import Metrics
from exitsafe.lppo.minibatches import Batch, Passes, deal
from exitsafe.lppo.sharding import in_step
from exitsafe.lppo.state import TrainingState
from exitsafe.lppo.step import StepOutcome
from exitsafe.records import Sample
from exitsafe.world.profile import WORLD, is_world

REFUSAL = "I'm sorry, but I can't help with that."


def refusal_for(samples: Sequence[Sample], config: LPPOConfig) -> str:
    """What harmful samples are answered with."""
    return config.refusal or (WORLD.refusal if is_world(samples[:1]) else REFUSAL)


def sft_step(state: TrainingState, targets: Mapping[int, Tensor], step: int) -> StepOutcome:
    """Do one step: one optimiser step per minibatch, shared by all processes.

    Args:
        state: The training; policy and optimiser change.
        targets: Token ids to learn, by index into `state.samples`.
        step: Its number.
    """
    started, learner = time.perf_counter(), state.learner
    indices = state.schedule.sample_indices[step].tolist()
    rows = state.features.rows(indices, state.schedule.exit_layers[step].tolist(), places=[])
    batch = deal(
        state.vlm,
        rows,
        [targets[index] for index in indices],
        config=state.config,
        rng=np.random.default_rng((state.config.seed, 4, step)),
        team=state.team,
        microbatch=state.sizes.microbatch,
    )
    batch = replace(batch, rows=state.features.fill(batch.rows, batch.places(state.team)))
    learning_rate, _ = learner.set_learning_rates(step)
    losses, norms = [], []
    for index in range(len(batch.minibatches)):
        loss = _accumulate(state, batch, index)
        norm = torch.nn.utils.clip_grad_norm_(learner.weights, state.config.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            learner.optimizer.step()
            losses.append(loss)
            norms.append(norm)
        learner.drop_gradients()
    state.sizes.agree(step)
    num_minibatches = len(batch.minibatches)
    num_skipped = num_minibatches - len(losses)
    state.totals.add(num_minibatches=num_minibatches, num_skipped=num_skipped)
    metrics: Metrics = {
        "step": step,
        "loss": fmean(losses) if losses else None,
        "grad_norm": fmean(norms) if norms else None,
        "num_minibatches": num_minibatches,
        "skipped_minibatches": num_skipped,
        "learning_rate": learning_rate,
        "seconds": time.perf_counter() - started,
    }
    note = f"loss {fmean(losses):.3f}" if losses else "every minibatch skipped"
    return StepOutcome(metrics=metrics, note=note, kl=None, completions=[])


def _accumulate(state: TrainingState, batch: Batch, index: int) -> float:
    """Accumulate the gradients of a minibatch over all processes. Returns the loss: the mean over its tokens."""
    loss = batch.in_passes(index, state.team, partial(_add_up, state, batch, index))
    state.team.sum_gradients(state.learner.weights)
    return float(state.team.sum(torch.tensor([loss], dtype=torch.float64)))


def _add_up(state: TrainingState, batch: Batch, index: int, passes: Passes) -> float:
    """Forward and backward passes of this process, from zero; returns its share of the loss."""
    state.learner.drop_gradients()
    num_tokens = sum(len(batch.responses[i]) for part in batch.minibatches[index] for i in part)
    total = 0.0
    for part, counts in passes:
        rows = [batch.rows[i] for i in part]
        now = state.policy.evaluate(rows, [batch.responses[i] for i in part])
        check_finite(now.logprobs, rows, what="log-probabilities", dtype=state.vlm.base_model.dtype)
        loss = -now.logprobs.sum() / num_tokens * counts  # zero outside the mask
        loss.backward()
        total += loss.item()
    return total


def sft_targets(state: TrainingState) -> dict[int, Tensor]:
    """Token ids to learn for each sample that is drawn, the end token included. The policy must be untrained.

    Raises:
        InputError: If an answer is not in the model's vocabulary, or too long for its context.
    """
    refusal = refusal_for(state.samples, state.config)
    drawn = {index: state.samples[index] for index in np.unique(state.schedule.sample_indices).tolist()}
    texts = {
        index: refusal if sample.kind == "harmful" else next(iter(sample.answers), None)
        for index, sample in drawn.items()
    }
    given = {
        index: _encode(state.vlm, drawn[index], text, state.config) for index, text in texts.items() if text is not None
    }
    return given | _own_answers(state, [index for index in texts if index not in given])


def _encode(vlm: VLM, sample: Sample, text: str, config: LPPOConfig) -> Tensor:
    ids: list[int] = vlm.tokenizer.encode(text, add_special_tokens=False)
    if set(ids) & set(vlm.special_token_ids):
        raise InputError(f"sample {sample.id}: its answer has words outside the model's vocabulary; change it")
    target = torch.tensor([*ids, vlm.turn_end_token_id])
    if len(target) > config.max_new_tokens:  # references are not truncated, so a long one needs more room
        vlm.read_ahead([sample], max_new_tokens=len(target))
    return target


def _own_answers(state: TrainingState, indices: Sequence[int]) -> dict[int, Tensor]:
    """Greedy answers at the default exit to the samples with these indices; each process gives its share."""
    vlm, config = state.vlm, state.config
    own = [indices[place] for place in state.team.places(len(indices))]
    answers: dict[int, Tensor] = {}
    with in_step(vlm, state.team):
        for start in range(0, len(own), config.rollout_batch_size):
            chunk = own[start : start + config.rollout_batch_size]
            prompts = [vlm.encode_prompt(state.samples[index]) for index in chunk]
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
                batch_size=state.sizes.rollout,
                suppress=vlm.special_token_ids,
            )
            answers |= {chunk[place]: torch.tensor(completion.token_ids) for place, completion in completions}
    return {index: answer for part in state.team.gather(answers) for index, answer in part.items()}
