"""One step of L-PPO, from top to bottom under the numbers of docs/lppo.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from exitsafe.errors import RunError
from exitsafe.judges.asking import list_reasons
from exitsafe.lppo.advantage import gae, group_advantages, has_equal_scores, masked_whiten
from exitsafe.lppo.logprobs import measure
from exitsafe.lppo.metrics import Completion, Metrics, group_metrics, mean, pick_completions, step_metrics
from exitsafe.lppo.minibatches import deal
from exitsafe.lppo.reward import Score, ScoredAnswers, final_scores, find_faults, shaped_rewards
from exitsafe.lppo.rollout import Trajectory
from exitsafe.lppo.scorer import part_means
from exitsafe.lppo.state import TrainingState
from exitsafe.lppo.update import Experience


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step leaves behind, beside the changes to the state."""

    metrics: Metrics  # the line of metrics.jsonl
    note: str  # for the progress bar
    kl: float | None  # nats per response; None where it is not measured
    completions: list[Completion]  # to save, if any


def lppo_step(state: TrainingState, step: int) -> StepOutcome:
    """Do one step. All processes share the work of 2 to 5 and 7, and each computes the rest.

    Raises:
        RunError: If no answer could be scored.
    """
    config, team, started = state.config, state.team, time.perf_counter()
    rng = np.random.default_rng((config.seed, 4, step))
    has_critic = config.method == "lppo"

    # 1. Draw samples and, for each, an exit layer.
    indices = state.schedule.sample_indices[step].tolist()
    exit_layers = state.schedule.exit_layers[step].tolist()
    samples = [state.samples[index] for index in indices]

    # 2. Image features at those exits. Everything below reads these.
    rows = state.features.rows(indices, exit_layers, places=state.own_places(len(indices)))

    # 3. Rollouts: one answer per row, all exits in one batch.
    drawn = state.rollout(samples, rows, draw=step)

    # 4. Score the texts. Clip, then subtract penalties and costs. An answer without a score is left out and counted.
    scores = state.score(drawn)
    scored = _keep_scored(state, step, drawn, scores)
    costs = state.constraints.costs([answer.sample for answer in scored.answers], scored.scores)
    final = final_scores(scored.values, [faults.penalty(config) for faults in scored.faults], config=config)
    final = state.constraints.penalised(final, costs).to(state.vlm.device)

    # 5. Log-probabilities of policy and reference, each row at its exit.
    rows, responses = [answer.row for answer in scored.answers], [answer.token_ids for answer in scored.answers]
    batch = deal(state.vlm, rows, responses, config=config, rng=rng, team=team, microbatch=state.sizes.microbatch)
    batch = replace(batch, rows=state.features.fill(rows, batch.places(team)))
    measured = measure(state.policy, batch, team)
    mask = measured.mask

    # 6. Advantages, and returns for the value head: from token rewards with the KL penalty, or against the group.
    groups = torch.tensor(scored.places, device=final.device) // config.group_size
    if has_critic:
        rewards = shaped_rewards(final, measured.logprobs, measured.ref_logprobs, mask, kl_coef=state.kl_coef)
        advantages, returns = gae(rewards, measured.values, mask, gamma=config.gamma, lam=config.lam)
        advantages = masked_whiten(advantages, mask)  # all exits together: one that does badly must push harder
    else:
        advantages = group_advantages(final, groups, mask)
        returns = torch.zeros_like(advantages)  # there is no value head to learn them

    # 7. Epochs of clipped policy and value losses; at first the value head alone. Without one, the KL is in the loss.
    trains_policy = not has_critic or step >= config.value_warmup_steps
    learning_rate, value_learning_rate = state.learner.set_learning_rates(step)
    stats = state.learner.update(
        Experience(batch=batch, measured=measured, advantages=advantages, returns=returns),
        train_policy=trains_policy,
        rng=rng,
        kl_coef=0.0 if has_critic else state.kl_coef,
    )
    state.sizes.agree(step)

    # 8. Metrics; then what the next step depends on: KL coefficient and multipliers.
    mean_costs = state.constraints.measure(costs, [row.exit_layer for row in rows])
    metrics: Metrics = {
        "step": step,
        **step_metrics(scored, final, measured, returns, stats, config=config),
        **({} if has_critic else group_metrics(final, groups)),
        **state.constraints.metrics(mean_costs),
        "reward_parts": part_means(scored.scores),
        "num_unscored": len(drawn) - len(scored.answers),
        "num_incoherent": sum(faults.is_incoherent for faults in scored.faults),
        "kl_coef": state.kl_coef,
        "learning_rate": learning_rate,
        "value_learning_rate": value_learning_rate,
        "seconds": time.perf_counter() - started,
    }
    compared = torch.zeros_like(groups) if has_critic else groups
    state.totals.add(
        num_minibatches=stats.num_minibatches,
        num_skipped=stats.skipped_minibatches,
        num_answers=len(drawn),
        num_unscored=len(drawn) - len(scored.answers),
        is_constant=bool(has_equal_scores(final, compared).all()),
    )
    kl = mean(measured.nats_per_response())
    if trains_policy:  # otherwise the policy cannot respond
        state.adapt(kl=kl, costs=mean_costs)
    finals = dict(zip(scored.places, final.tolist(), strict=True))
    completions = pick_completions(drawn, scores, finals, step=step, config=config)
    note = f"reward {mean(scored.values):.2f}, KL {kl:.2f}"
    return StepOutcome(metrics=metrics, note=note, kl=kl, completions=completions)


def _keep_scored(
    state: TrainingState, step: int, answers: Sequence[Trajectory], scores: Sequence[Score]
) -> ScoredAnswers:
    places = [place for place, score in enumerate(scores) if score.value is not None]
    if not places:
        raise RunError(
            f"step {step}: none of {len(answers)} answers could be scored ({list_reasons(state.scorer.unscored)}); "
            "check the reward, then rerun the same command to resume"
        )
    kept = [answers[place] for place in places]
    return ScoredAnswers(
        answers=kept,
        scores=[scores[place] for place in places],
        faults=find_faults([answer.response for answer in kept]),
        places=places,
    )
