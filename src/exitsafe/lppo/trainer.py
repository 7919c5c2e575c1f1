"""The training loop: set-up, resume, one step after another with evaluations and checkpoints between them, the adapter.

A model, samples and a reward go in; a PEFT adapter comes out. What one step does is in `step.py`, for fine-tuning in
`sft.py`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch

from exitsafe.engine.load import as_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.judges import Judge
from exitsafe.judges.asking import list_reasons
from exitsafe.lppo.batch_sizes import BatchSizes
from exitsafe.lppo.calibration import calibrate
from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.constraints import check_constraints
from exitsafe.lppo.evaluation import Evaluation, Evaluator, default_evaluation
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.folder import (
    COMPLETIONS,
    EVALUATIONS,
    METRICS,
    Result,
    TrainingFolder,
    run_settings,
    warn_of_audited,
)
from exitsafe.lppo.interrupt import Stop, noted_signals
from exitsafe.lppo.metrics import CONSTANT, SKIPPED, Totals
from exitsafe.lppo.parallel import Team, this_team
from exitsafe.lppo.policy import attached_policy, check_trainable
from exitsafe.lppo.reward import Reward, WeightedSum
from exitsafe.lppo.sampler import draw_schedule, trained_exits, warn_of_harmful_only
from exitsafe.lppo.scorer import Scorer, as_scorer
from exitsafe.lppo.sft import refusal_for, sft_step, sft_targets
from exitsafe.lppo.sharding import check_launch, shard
from exitsafe.lppo.state import Checkpoint, TrainingState
from exitsafe.lppo.step import StepOutcome, lppo_step
from exitsafe.lppo.trackers import Track, check_trackers, tracking
from exitsafe.machine.memory import Gauge, free_memory
from exitsafe.records import Progress, Sample
from exitsafe.store.fingerprint import pin_today

MOST_CACHE_BYTES = 8e9


def align(
    vlm: VLM | str | Path,
    samples: Sequence[Sample],
    *,
    reward: Reward | Judge | WeightedSum | None = None,
    config: LPPOConfig | None = None,
    evaluation: Evaluation | Literal["auto"] | None = "auto",
    track: Sequence[str] = (),
    out: str | Path,
    progress: Progress | None = None,
) -> Path:
    """Align a model at many exit layers: by layer-wise PPO, or as `config.method` says.

    Only the language model is trained. The model is given back as it was: load the adapter to use it. Called again
    with the same arguments, an interrupted run resumes from its last checkpoint, and ends with the same bits as one
    that was never interrupted (on the CPU; GPU kernels may round differently from run to run).

    Under `accelerate launch` the processes share the work of each step; `config` means the whole run, whatever their
    number, and so do its results, to rounding. All must see the folder, and give the same arguments. Under FSDP2 the
    model's frozen weights stay cut up: load it again to use it.

    Args:
        vlm: The model, or its name as for `load_vlm`. If it has an adapter of the language model, training continues
            from that, and the result replaces it.
        samples: What to train on, of all the kinds that should keep or change their behaviour.
        reward: A callable `(samples, responses) -> list[float]` (NaN: unscored), a judge, or None for the built-in
            reward, which uses the guard model `qwen3guard` to reward refusing harmful requests and answering the rest
            (on the organism, its world's rule); or a weighted sum of these.
        config: All constants; None is `LPPOConfig.for_model`, the model's usual ones.
        evaluation: Held-out evaluation by a judge that is not the reward: the best weights become the adapter, and
            training stops when they no longer improve. "auto" holds out some of the samples if such a judge's model has
            been downloaded already; None never evaluates.
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
    exit_layers = trained_exits(config, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    check_trainable(vlm, config)
    check_launch(vlm, config)
    check_trackers(track)
    scorer = as_scorer(reward, samples, method=config.method)
    if evaluation == "auto":
        samples, evaluation = default_evaluation(scorer, samples, num_steps=config.num_steps)
    samples = tuple(samples)
    schedule = draw_schedule(samples, exit_layers, config)
    check_constraints(config, samples, exit_layers, reward=scorer.name, gives_costs=scorer.gives_costs)
    pin_today(vlm, out)
    sizes = BatchSizes(config, team)
    evaluator = None
    if evaluation is not None:
        evaluator = Evaluator(
            evaluation,
            vlm,
            trained_on=samples,
            scorer=scorer,
            exit_layers=exit_layers,
            config=config,
            rollout_size=sizes.rollout,
            team=team,
        )
    folder = _open_folder(Path(out), vlm, samples, exit_layers, scorer, evaluator, config, team)
    if folder.is_finished:
        warnings.warn(f"{out} was finished already: nothing was done", stacklevel=2)
        return folder.adapter
    with noted_signals() as stop, folder.locked(), attached_policy(vlm, config) as policy:
        team.take_first(list(policy.weights().values()))
        untrained = _digest(policy.weights())
        if team.is_sharded:
            shard(vlm, team)
        gauge = Gauge(vlm.device)
        with stop.at_once():
            features = FeatureStore(vlm, samples, exit_layers, max_bytes=_cache_bytes(config))
            state = TrainingState(
                policy=policy,
                samples=samples,
                exit_layers=exit_layers,
                schedule=schedule,
                features=features,
                scorer=scorer,
                config=config,
                sizes=sizes,
                team=team,
            )
            take_step = partial(lppo_step, state)
            if config.method == "sft":
                take_step = partial(sft_step, state, sft_targets(state))
            step = _resume(state, evaluator, folder)
        with tracking(track, folder.path, first_step=step) as log:
            step = _Loop(state, take_step, evaluator, folder, gauge, stop, log, progress).run(step)
        _finish(state, evaluator, folder, step, untrained=untrained)
        team.wait()
    return folder.adapter


def _cache_bytes(config: LPPOConfig) -> float:
    """Main memory for image features."""
    if config.feature_cache_gb is not None:
        return config.feature_cache_gb * 1e9
    return min(MOST_CACHE_BYTES, free_memory(torch.device("cpu")) / 4)


def _open_folder(
    out: Path,
    vlm: VLM,
    samples: Sequence[Sample],
    exit_layers: Sequence[int],
    scorer: Scorer,
    evaluator: Evaluator | None,
    config: LPPOConfig,
    team: Team,
) -> TrainingFolder:
    """Create or reopen the folder of a run. Warns of questionable settings if the run is not finished."""
    settings, sizes = run_settings(vlm, samples, exit_layers, config)
    settings |= {"refusal": refusal_for(samples, config)} if config.method == "sft" else scorer.settings
    if evaluator is not None:
        settings["evaluation"] = evaluator.settings
    if team.is_first and not TrainingFolder(out).is_finished:
        warn_of_audited(samples, out)
    with team.first_goes_first():
        folder = TrainingFolder.open(out, settings, sizes, is_writer=team.is_first)
    if team.is_first and not folder.is_finished:
        scorer.warn_of_proxies()
        warn_of_harmful_only(samples, config)
    return folder


def _resume(state: TrainingState, evaluator: Evaluator | None, folder: TrainingFolder) -> int:
    """Restore the newest whole checkpoint, or prepare the first step. Returns the number of steps done."""
    step, found = 0, load_checkpoint(folder.checkpoints, state.vlm.device)
    if found is not None:
        step, saved = found[0], cast(Checkpoint, found[1])
        state.restore(saved)
        if evaluator is not None:
            evaluator.restore(saved["evaluation"])
    elif state.config.method != "sft":
        calibrate(state)
    if len(set(state.team.gather(step))) > 1:
        raise RunError(f"the processes see different checkpoints in {folder.path}: give a folder on a shared disk")
    folder.drop_lines_from(step)
    return step


@dataclass(eq=False)
class _Loop:
    """All steps from the first one that is not done, with evaluations and checkpoints between them.

    On a signal the step under way is finished and saved. An evaluation is not: it comes after its step's checkpoint
    and is repeated.
    """

    state: TrainingState
    take_step: Callable[[int], StepOutcome]
    evaluator: Evaluator | None
    folder: TrainingFolder
    gauge: Gauge
    stop: Stop
    log: Track
    progress: Progress | None

    def run(self, step: int) -> int:
        """Train. Returns how many steps are done in the end."""
        config = self.state.config
        self._announce(step)
        self._report(step, "")
        while True:
            self._evaluate(step)
            if step == config.num_steps or (self.evaluator is not None and self.evaluator.is_over):
                return step
            note = self._step(step)
            step += 1
            is_interrupted = self.state.team.any(self.stop.is_asked)
            is_due = step % config.checkpoint_every == 0 or step == config.num_steps
            is_evaluated = self.evaluator is not None and self.evaluator.is_due(step)
            if is_due or is_evaluated or is_interrupted:
                self._save(step)
            self._report(step, note)
            if fault := self.state.totals.fault():
                raise RunError(
                    f"stopped after step {step} of {config.num_steps}: {fault}. Metrics and checkpoints are kept in "
                    f"{self.folder.path}"
                )
            if is_interrupted:
                self.state.team.wait()  # the launcher stops all when one leaves
                raise self.stop.interrupt()

    def _step(self, step: int) -> str:
        """Do one step and write its lines. Returns a note for the progress bar."""
        outcome = self.take_step(step)
        metrics = outcome.metrics | self.state.team.reduce(max, self.gauge.read())  # features and evaluations count too
        self.folder.append(METRICS, metrics)
        self.folder.append(COMPLETIONS, *map(asdict, outcome.completions))
        self.log(metrics, step)
        if self.evaluator is not None:
            self.evaluator.kl = outcome.kl
        return outcome.note

    def _evaluate(self, step: int) -> None:
        if self.evaluator is None or not self.evaluator.is_due(step):
            return
        with self.stop.at_once():
            line = self.evaluator.evaluate(step, self.state.policy.weights())
            self.folder.append(EVALUATIONS, line)
            self.log({"evaluation": line}, step)

    def _save(self, step: int) -> None:
        saved = self.state.checkpoint()
        if self.evaluator is not None:
            saved["evaluation"] = self.evaluator.state()
        if self.state.team.is_first:
            save_checkpoint(self.folder.checkpoints, step, saved)
        self._announce(step)

    def _announce(self, step: int) -> None:
        """Set what an interrupt says: where the same command would resume."""
        num_steps = self.state.config.num_steps
        self.stop.message = f"interrupted; rerun the same command to resume from step {step} of {num_steps}"

    def _report(self, step: int, note: str) -> None:
        if self.progress is not None:
            self.progress(step, self.state.config.num_steps, note)


def _finish(
    state: TrainingState, evaluator: Evaluator | None, folder: TrainingFolder, step: int, *, untrained: str
) -> None:
    """Write result and adapter.

    Raises:
        RunError: If all minibatches that could have trained the policy were skipped.
    """
    policy, totals = state.policy, state.totals
    if totals.skipped_in_a_row and _digest(policy.weights()) == untrained:
        raise RunError(
            f"nothing was learnt: {totals.skipped_minibatches} of {totals.minibatches} minibatches were skipped, "
            f"including all that train the policy: {SKIPPED}. No adapter was written; the checkpoints are kept"
        )
    if reasons := state.scorer.unscored:
        warnings.warn(
            f"the reward could not score every answer, and nothing was learnt from those that it left out: "
            f"{list_reasons(reasons)}",
            RuntimeWarning,
            stacklevel=3,
        )
    choice: Result = {"adapter_step": step, "why": "the last step"}
    if evaluator is not None:
        choice = evaluator.choose(step)
        policy.load_weights(evaluator.best_weights or policy.weights())
    why_not = _why_nothing_was_learnt(totals, has_moved=_digest(policy.weights()) != untrained)
    if why_not is not None:
        warnings.warn(f"nothing was learnt: {why_not}", RuntimeWarning, stacklevel=3)
    folder.save_result(
        {
            "steps": step,
            **choice,
            "learnt": why_not is None,
            "why_not": why_not,
            "answers": totals.answers,
            "unscored_answers": totals.unscored_answers,
            "minibatches": totals.minibatches,
            "skipped_minibatches": totals.skipped_minibatches,
            "constant_steps": totals.constant_steps,
        }
    )
    folder.save_adapter(policy.save, trained_on=state.samples, earlier=state.vlm.trained_on)


def _why_nothing_was_learnt(totals: Totals, *, has_moved: bool) -> str | None:
    if totals.is_constant:
        return f"the final scores of every step were equal: {CONSTANT}"
    return None if has_moved else "the adapter's weights are those it started with"


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A digest that changes if any of the weights does."""
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
