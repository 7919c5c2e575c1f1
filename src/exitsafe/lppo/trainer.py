"""L-PPO: the whole algorithm, one step after another under the numbers of docs/lppo.md.

A model, samples and a reward go in; a PEFT adapter comes out. What each step does is in the file of its name; what
is left here is their order, and what must survive an interrupt.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exitsafe.engine.generation import NO_MEMORY as NO_ROW
from exitsafe.engine.load import as_vlm
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.judges import Judge
from exitsafe.judges.asking import list_reasons
from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.constraints import Constraints, check_constraints, every_pair
from exitsafe.lppo.evaluation import Evaluation, Evaluator
from exitsafe.lppo.experience import NO_MEMORY as NO_PASS
from exitsafe.lppo.experience import compare_groups, deal, estimate_advantages, measure, token_rewards
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.folder import TrainingFolder, run_settings, warn_of_audited
from exitsafe.lppo.interrupt import Stop, noted_signals
from exitsafe.lppo.kl import adapted_kl_coef
from exitsafe.lppo.metrics import CONSTANT, SKIPPED, Totals, num_equal_groups, step_metrics
from exitsafe.lppo.parallel import ALONE, Team, this_team
from exitsafe.lppo.policy import Policy, attached_policy, check_end_token, check_precision, check_trainable
from exitsafe.lppo.reward import Reward, Score, final_scores, find_faults
from exitsafe.lppo.rollout import Trajectory, rollout
from exitsafe.lppo.sampler import Schedule, draw_schedule, trained_exits, warn_of_harmful_only
from exitsafe.lppo.scorer import Scorer, WeightedSum, as_scorer, part_means
from exitsafe.lppo.sharding import check_launch, shard
from exitsafe.lppo.trackers import Track, check_trackers, tracking
from exitsafe.lppo.update import Learner
from exitsafe.machine.memory import BatchSize, Gauge
from exitsafe.records import Progress, Sample
from exitsafe.store.fingerprint import pin_today


def align(
    vlm: VLM | str | Path,
    samples: Sequence[Sample],
    *,
    reward: Reward | Judge | WeightedSum | None = None,
    config: LPPOConfig | None = None,
    evaluation: Evaluation | None = None,
    track: Sequence[str] = (),
    out: str | Path,
    progress: Progress | None = None,
) -> Path:
    """Align a model at many exit layers by layer-wise PPO.

    Only the language model is trained. The model is given back as it was: load the adapter to use it. Called again
    with the same arguments, an interrupted run resumes from its last checkpoint, and ends with the same bits as one
    that was never interrupted (on the CPU; GPU kernels may round differently from run to run).

    Under `accelerate launch` the processes share the work of each step; `config` means the whole run, whatever their
    number, and so do its results, to rounding. All must see the folder, and give the same arguments. Under FSDP2 the
    model's frozen weights stay cut up: load it again to use it.

    Args:
        vlm: The model, which must not carry an adapter, or its name as for `load_vlm`.
        samples: What to train on, of all the kinds that should keep or change their behaviour.
        reward: A callable `(samples, responses) -> list[float]` (NaN: unscored), a judge, or None for the built-in
            reward, which uses the guard model `qwen3guard` to reward refusing harmful requests and answering the rest
            (on the organism, its world's rule); or a weighted sum of these.
        config: All constants; None is `LPPOConfig.for_model`, the model's usual ones.
        evaluation: Held-out evaluation by a judge that is not the reward: the best weights become the adapter.
        track: Trackers that get each step's numbers beside metrics.jsonl: "tensorboard", "trackio", "wandb".
        out: Folder for settings, metrics, checkpoints and adapter; new, empty, or of the same run.
        progress: Called before the first step and after each.

    Returns:
        The PEFT adapter's folder, `out/adapter`.

    Raises:
        InputError: If samples, settings or the reward's scores cannot be used, a prompt leaves no room for an answer,
            the reward's judge is not available, the evaluation's judge is the reward, or the processes were started in
            a way that is not supported.
        RunError: If `out` holds another run, no answer of a step could be scored, every minibatch is skipped or scores
            never differ (nothing can be learnt), or another process has failed.
        KeyboardInterrupt: On SIGINT or SIGTERM, when the step under way is done and saved; a second one does not wait.
    """
    team = this_team()
    vlm = as_vlm(vlm)
    config = config or LPPOConfig.for_model(vlm.name)
    samples = tuple(samples)
    exit_layers = trained_exits(config, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    schedule = draw_schedule(samples, exit_layers, config)
    check_trainable(vlm, config)
    check_end_token(vlm)
    check_precision(vlm)
    check_launch(vlm, config)
    check_trackers(track)
    scorer = as_scorer(reward, samples)
    check_constraints(config, samples, exit_layers, reward=scorer.name, gives_costs=scorer.gives_costs)
    pin_today(vlm, out)
    settings, sizes = run_settings("lppo", vlm, samples, exit_layers, config)
    settings |= scorer.settings
    evaluator = None
    if evaluation is not None:
        evaluator = Evaluator(
            evaluation, vlm, trained_on=samples, scorer=scorer, exit_layers=exit_layers, config=config, team=team
        )
        settings["evaluation"] = evaluator.settings
    if team.is_first and not TrainingFolder(Path(out)).is_finished:
        warn_of_audited(samples, Path(out))
    with team.first_goes_first():
        folder = TrainingFolder.open(Path(out), settings, sizes, is_writer=team.is_first)
    if folder.is_finished:
        warnings.warn(f"{out} was finished already: nothing was done", stacklevel=2)
        return folder.adapter
    if team.is_first:
        scorer.warn_of_proxies()
        warn_of_harmful_only(samples, config)
    with noted_signals() as stop, folder.locked(), attached_policy(vlm, config) as policy:
        team.take_first(list(policy.weights().values()))
        untrained = _digest(policy.weights())
        if team.is_sharded:
            shard(vlm, team)
        gauge = Gauge(vlm.device)
        with stop.at_once():
            features = FeatureStore(vlm, samples, exit_layers, max_bytes=config.feature_cache_gb * 1e9)
            run = _Run(policy, samples, exit_layers, schedule, features, scorer, config, team)
            first_step = _resume(run, evaluator, folder)
        with tracking(track, folder.path, first_step=first_step) as log:
            num_steps = _train(run, evaluator, folder, first_step, gauge=gauge, stop=stop, log=log, progress=progress)
        _check_applied(run.totals, has_moved=_digest(policy.weights()) != untrained)
        if reasons := scorer.unscored:
            warnings.warn(
                f"the reward could not score every answer, and nothing was learnt from those that it left out: "
                f"{list_reasons(reasons)}",
                RuntimeWarning,
                stacklevel=2,
            )
        result: dict[str, Any] = {"steps": num_steps, "adapter_step": num_steps, "why": "the last step"}
        if evaluator is not None:
            result = evaluator.outcome(num_steps)
            policy.load_weights(evaluator.best_weights or policy.weights())
        folder.save_result(result | _learnt(run.totals, has_moved=_digest(policy.weights()) != untrained))
        folder.save_adapter(policy.save, trained_on=samples)
        team.wait()
    return folder.adapter


def _check_applied(totals: Totals, *, has_moved: bool) -> None:
    """Raise RunError if all minibatches that could have trained the policy were skipped."""
    if totals.skipped_in_a_row and not has_moved:
        raise RunError(
            f"nothing was learnt: {totals.skipped_minibatches} of {totals.minibatches} minibatches were skipped, "
            f"including all that train the policy: {SKIPPED}. No adapter was written; the checkpoints are kept"
        )


def _learnt(totals: Totals, *, has_moved: bool) -> dict[str, Any]:
    """For the result: whether anything was learnt, and the counts that say so; warns if nothing was."""
    why_not = None
    if totals.is_constant:
        why_not = f"the final scores of every step were equal: {CONSTANT}"
    elif not has_moved:
        why_not = "the adapter's weights are those it started with"
    if why_not is not None:
        warnings.warn(f"nothing was learnt: {why_not}", RuntimeWarning, stacklevel=3)
    counts = asdict(totals)
    del counts["steps"], counts["skipped_in_a_row"]
    return {"learnt": why_not is None, "why_not": why_not, **counts}


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A digest that changes if any of the weights does."""
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resume(run: _Run, evaluator: Evaluator | None, folder: TrainingFolder) -> int:
    """Take up the newest whole checkpoint, or begin. Returns the step to go on with."""
    step, found = 0, load_checkpoint(folder.checkpoints, run.vlm.device)
    if found is None:
        run.begin()
    else:
        step, state = found
        run.restore(state)
        if evaluator is not None:
            evaluator.restore(state["evaluation"])
    if len(set(run.team.gather(step))) > 1:
        raise RunError(f"the processes see different checkpoints in {folder.path}: give a folder on a shared disk")
    folder.keep_metrics(step)
    folder.keep_completions(step)
    if evaluator is not None:
        folder.keep_evaluations(len(evaluator.results))
    return step


def _train(
    run: _Run,
    evaluator: Evaluator | None,
    folder: TrainingFolder,
    step: int,
    *,
    gauge: Gauge,
    stop: Stop,
    log: Track,
    progress: Progress | None,
) -> int:
    """All steps from this one on, with evaluations and checkpoints between them. Returns how many are done in the end.

    On a signal the step under way is finished and saved. An evaluation is not: it comes after its step's checkpoint
    and is repeated.
    """
    config, team = run.config, run.team
    stop.message = _goes_on(step, config)
    if progress is not None:
        progress(step, config.num_steps, "")
    while True:
        if evaluator is not None and evaluator.is_due(step):
            with stop.at_once():
                result = evaluator.evaluate(step, run.policy.weights())
                folder.add_evaluation(result)
                log({"evaluation": result}, step)
        if step == config.num_steps or (evaluator is not None and evaluator.is_over):
            return step
        metrics = run.step(step)
        metrics |= team.largest(gauge.read())  # features and evaluations before the step count too
        folder.add_metrics(metrics)
        folder.add_completions(run.completions)
        log(metrics, step)
        step += 1
        if evaluator is not None:
            evaluator.kl = metrics["kl"]
        is_wanted = team.any(stop.is_asked)
        is_due = step % config.checkpoint_every == 0 or step == config.num_steps
        if is_due or is_wanted or (evaluator is not None and evaluator.is_due(step)):
            state = run.state() | ({} if evaluator is None else {"evaluation": evaluator.state()})
            if team.is_first:
                save_checkpoint(folder.checkpoints, step, state)
            stop.message = _goes_on(step, config)
        if progress is not None:
            progress(step, config.num_steps, f"reward {metrics['reward']:.2f}, KL {metrics['kl']:.2f}")
        if fault := run.totals.fault():
            raise RunError(
                f"stopped after step {step} of {config.num_steps}: {fault}. Metrics and checkpoints are kept in "
                f"{folder.path}"
            )
        if is_wanted:
            team.wait()  # the launcher stops all when one leaves
            raise stop.interrupt()


def _goes_on(step: int, config: LPPOConfig) -> str:
    return f"interrupted; rerun the same command to resume from step {step} of {config.num_steps}"


def _batch_size(name: str, most: int, problem: str, team: Team) -> BatchSize:
    """A size of the config that is halved when memory runs out: not among processes that must keep in step."""
    if team.is_sharded:
        problem = (
            f"out of memory with {name}={most}, and processes that share sharded weights cannot halve it as they run: "
            f"set {name}: {max(1, most // 2)} in --config FILE.yaml, then rerun the same command to resume"
        )
    return BatchSize(most, problem=problem, is_fixed=team.is_sharded)


class _Run:
    """Everything that lives from step to step."""

    def __init__(
        self,
        policy: Policy,
        samples: Sequence[Sample],
        exit_layers: Sequence[int],
        schedule: Schedule,
        features: FeatureStore,
        scorer: Scorer,
        config: LPPOConfig,
        team: Team = ALONE,
    ) -> None:
        self.policy = policy
        self.team = team
        self.vlm = policy.vlm
        self.samples = samples
        self.scorer = scorer
        self.config = config
        self.schedule = schedule
        self.exit_layers = exit_layers
        self.features = features
        self.learner = Learner(policy, config, team)
        self.rollout_size = _batch_size("rollout_batch_size", config.rollout_batch_size, NO_ROW, team)
        self.microbatch = _batch_size("microbatch_tokens", config.microbatch_tokens, NO_PASS, team)
        self.kl_coef = config.kl_coef
        self.constraints = Constraints(config)
        self.totals = Totals()
        self._agreed = {"rollout_batch_size": config.rollout_batch_size, "microbatch_tokens": config.microbatch_tokens}
        self.completions: list[dict[str, Any]] = []
        """Answers of the last step to keep."""

    def step(self, step: int) -> dict[str, Any]:
        """One step of L-PPO. Returns its metrics. All processes share the work of 2 to 5 and 7; each knows the rest."""
        config, team, started = self.config, self.team, time.perf_counter()
        rng = np.random.default_rng((config.seed, 4, step))

        # 1. Draw samples and, for each, an exit layer.
        indices = self.schedule.sample_indices[step]
        exit_layers = self.schedule.exit_layers[step]
        samples = [self.samples[i] for i in indices]

        # 2. Image features at those exits. All that follows reads these.
        own = team.places(len(indices), group_size=config.group_size)
        rows = self.features.rows(indices.tolist(), exit_layers.tolist(), places=own)

        # 3. Rollouts: one answer per row, all exits in one batch.
        answers = self._rollout(samples, rows, draw=step)

        # 4. Score the texts; what could not be scored is left out and counted.
        scores = self._scores(answers)
        places = [place for place, score in enumerate(scores) if score.value is not None]
        if not places:
            raise RunError(
                f"step {step}: none of {len(answers)} answers could be scored ({list_reasons(self.scorer.unscored)}); "
                "check the reward, then rerun the same command to resume"
            )
        drawn, all_scores = answers, scores
        answers, scores = [answers[place] for place in places], [scores[place] for place in places]
        faults = find_faults([answer.response for answer in answers])
        final = final_scores(
            [s.value for s in scores if s.value is not None],
            [found.penalty(config) for found in faults],
            config=config,
        )
        exits = [answer.row.exit_layer for answer in answers]
        costs = self.constraints.costs([answer.sample for answer in answers], scores)
        final = self.constraints.penalised(final, costs)
        self.completions = self._completions(step, drawn, all_scores, dict(zip(places, final.tolist(), strict=True)))

        # 5. Log-probabilities of policy and reference, each row at its exit.
        rows, responses = [answer.row for answer in answers], [answer.token_ids for answer in answers]
        batch = deal(self.vlm, rows, responses, config=config, rng=rng, team=team, microbatch=self.microbatch)
        batch = replace(batch, rows=self.features.fill(rows, batch.places(team)))
        measured = measure(self.policy, batch, team)

        # 6. Advantages, and returns for the critic: from KL-shaped token rewards, or against the answer's group.
        groups = torch.tensor(places) // config.group_size
        if has_critic := config.algorithm == "ppo":
            rewards = token_rewards(measured, final, kl_coef=self.kl_coef)
            advantages, returns = estimate_advantages(measured, rewards, config=config)
        else:
            advantages, returns = compare_groups(measured, final, groups)

        # 7. Epochs of clipped policy and value losses; at first the value head alone. No critic: KL in the loss.
        trains_policy = not has_critic or step >= config.value_warmup_steps
        learning_rate, value_learning_rate = self.learner.set_learning_rates(step)
        stats = self.learner.update(
            batch,
            measured,
            advantages,
            returns,
            train_policy=trains_policy,
            rng=rng,
            kl_coef=0.0 if has_critic else self.kl_coef,
        )
        self._agree_on_sizes(step)

        # 8. Metrics; then what the next step hangs on: KL coefficient and multipliers.
        metrics = {"step": step} | step_metrics(answers, scores, final, faults, measured, returns, stats, config=config)
        is_constant = metrics["final_score_std"] == 0.0
        if not has_critic:
            metrics["num_equal_groups"] = num_equal_groups(final, groups)
            is_constant = metrics["num_equal_groups"] == len(groups.unique())
        mean_costs = self.constraints.measure(costs, exits)
        metrics |= self.constraints.metrics(mean_costs)
        metrics |= {
            "reward_parts": part_means(scores),
            "num_unscored": len(samples) - len(answers),
            "num_incoherent": sum(found.is_incoherent for found in faults),
            "kl_coef": self.kl_coef,
            "learning_rate": learning_rate,
            "value_learning_rate": value_learning_rate,
            "seconds": time.perf_counter() - started,
        }
        self.totals.add(metrics, num_answers=len(samples), is_constant=is_constant)
        if trains_policy:  # otherwise the policy cannot respond
            self._adapt(metrics["kl"], mean_costs)
        return metrics

    def begin(self) -> None:
        """What comes before the first step."""
        if num := self.scorer.num_calibration(self.config.calibration_samples):
            self._calibrate(num)
        if self.constraints.needs_reference:
            self._measure_reference()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.policy.load_weights(state["weights"])
        self.policy.value_head.load_state_dict(state["value_head"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.value_optimizer.load_state_dict(state["value_optimizer"])
        self.kl_coef = state["kl_coef"]
        self.constraints.load_state(state["constraints"])
        self.totals = Totals(**state["totals"])
        self.scorer.calibration = [(mean, deviation) for mean, deviation in state["calibration"]]
        torch.set_rng_state(state["rng"][self.team.number % len(state["rng"])].cpu())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on beside the settings. Schedule and learning rates follow from these and
        the step's number; each process's torch random state is kept for rewards that draw."""
        return {
            "weights": self.policy.weights(),
            "value_head": self.policy.value_head.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "value_optimizer": self.learner.value_optimizer.state_dict(),
            "kl_coef": self.kl_coef,
            "constraints": self.constraints.state(),
            "totals": asdict(self.totals),
            "calibration": self.scorer.calibration,
            "rng": self.team.gather(torch.get_rng_state()),
        }

    def _rollout(self, samples: Sequence[Sample], rows: Sequence[Row], *, draw: int) -> list[Trajectory]:
        return rollout(
            self.vlm, samples, rows, config=self.config, draw=draw, team=self.team, batch_size=self.rollout_size
        )

    def _agree_on_sizes(self, step: int) -> None:
        """What has run out of memory in one process is cut smaller in all of them from the next step on."""
        sizes = {"rollout_batch_size": self.rollout_size, "microbatch_tokens": self.microbatch}
        found = self.team.smallest({name: size.most for name, size in sizes.items()})
        smaller = [f"{name} is now {found[name]}" for name in sizes if found[name] < self._agreed[name]]
        if smaller and self.team.is_first:
            warnings.warn(
                f"out of memory in step {step}: {' and '.join(smaller)}, which changes results by rounding alone",
                RuntimeWarning,
                stacklevel=2,
            )
        for name, size in sizes.items():
            size.most = self._agreed[name] = found[name]

    def _adapt(self, kl: float, costs: Mapping[str, float | None]) -> None:
        """Move the KL coefficient and the constraints' multipliers by what this step measured."""
        config = self.config
        if config.kl_target is not None:
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=config.kl_target, initial=config.kl_coef)
        self.constraints.ascend(costs)

    def _scores(self, answers: Sequence[Trajectory]) -> list[Score]:
        """A score of each answer: every process has those of its share scored."""
        own = self.team.places(len(answers), group_size=self.config.group_size)
        scores = self.scorer([answers[i].sample for i in own], [answers[i].response for i in own])
        return self.team.merge(dict(zip(own, scores, strict=True)))

    def _completions(
        self, step: int, answers: Sequence[Trajectory], scores: Sequence[Score], final: Mapping[int, float]
    ) -> list[dict[str, Any]]:
        """Some answers of a step, evenly spaced over the batch, with what they scored; `final` is by place."""
        config, num = self.config, min(self.config.save_completions, len(answers))
        if step % config.checkpoint_every and step + 1 < config.num_steps:
            return []
        return [
            {
                "step": step,
                "sample_id": answers[place].sample.id,
                "kind": answers[place].sample.kind,
                "exit_layer": answers[place].row.exit_layer,
                "text": answers[place].response.text,
                "finish_reason": answers[place].response.finish_reason,
                "num_tokens": answers[place].response.num_tokens,
                "score": scores[place].value,
                "final_score": final.get(place),
            }
            for place in (number * len(answers) // num for number in range(num))
        ]

    def _calibrate(self, num: int) -> None:
        """Bring the scores of the untrained model to one scale, on the first samples at the exits drawn for them."""
        indices = np.resize(self.schedule.sample_indices, num).tolist()
        exit_layers = np.resize(self.schedule.exit_layers, num).tolist()
        places = self.team.places(num, group_size=self.config.group_size)
        rows = self.features.rows(indices, exit_layers, places=places)
        samples = [self.samples[i] for i in indices]
        answers = self._rollout(samples, rows, draw=-1)
        scores = self.scorer.raw_scores([samples[i] for i in places], [answers[i].response for i in places])
        only_open = self.config.calibration_samples is None
        self.scorer.calibrate(self.team.merge(dict(zip(places, scores, strict=True))), only_open=only_open)

    def _measure_reference(self) -> None:
        """How often the untrained model answers picture questions wrongly at each exit: all exits in turn."""
        config, num = self.config, self.config.constraint_samples
        asked = [index for index, sample in enumerate(self.samples) if sample.kind == "vqa"]
        asked = np.random.default_rng((config.seed, 6)).permutation(asked).tolist()
        asked, exit_layers = every_pair(asked, self.exit_layers, num)
        costs: list[float | None] = []
        for start in range(0, num, config.batch_size):  # in parts, for the features' sake
            indices, exits = (drawn[start : start + config.batch_size] for drawn in (asked, exit_layers))
            samples = [self.samples[index] for index in indices]
            places = self.team.places(len(indices), group_size=config.group_size)
            rows = self.features.rows(indices, exits, places=places)
            answers = self._rollout(samples, rows, draw=-2 - start)
            costs += self.constraints.costs(samples, self._scores(answers))["utility"]
        self.constraints.set_reference(costs, exit_layers)
