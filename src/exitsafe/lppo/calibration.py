"""Before the first step: the scale of rewards and costs, measured on the untrained model's answers."""

from __future__ import annotations

import numpy as np

from exitsafe.lppo.constraints import every_pair
from exitsafe.lppo.state import TrainingState


def calibrate(state: TrainingState) -> None:
    """Normalise the reward and measure the reference of the utility constraint, where the settings ask for it."""
    if num := state.scorer.num_calibration(state.config.calibration_samples):
        _normalise_scores(state, num)
    if state.constraints.needs_reference:
        _measure_reference(state)


def _normalise_scores(state: TrainingState, num: int) -> None:
    """Bring each part of the reward to one scale, on the first samples at the exits drawn for them."""
    indices = np.resize(state.schedule.sample_indices, num).tolist()
    exit_layers = np.resize(state.schedule.exit_layers, num).tolist()
    own = state.own_places(num)
    rows = state.features.rows(indices, exit_layers, places=own)
    samples = [state.samples[i] for i in indices]
    answers = state.rollout(samples, rows, draw=-1)
    scores = state.scorer.raw_scores([samples[i] for i in own], [answers[i].response for i in own])
    only_open = state.config.calibration_samples is None
    state.scorer.calibrate(state.team.merge(dict(zip(own, scores, strict=True))), only_open=only_open)


def _measure_reference(state: TrainingState) -> None:
    """How often the untrained model answers picture questions wrongly at each exit: all exits in turn."""
    config, num = state.config, state.config.constraint_samples
    asked = [index for index, sample in enumerate(state.samples) if sample.kind == "vqa"]
    asked = np.random.default_rng((config.seed, 6)).permutation(asked).tolist()
    asked, exit_layers = every_pair(asked, state.exit_layers, num)
    costs: list[float | None] = []
    for start in range(0, num, config.batch_size):  # in parts: their features are in memory at once
        indices, exits = (drawn[start : start + config.batch_size] for drawn in (asked, exit_layers))
        samples = [state.samples[index] for index in indices]
        rows = state.features.rows(indices, exits, places=state.own_places(len(indices)))
        answers = state.rollout(samples, rows, draw=-2 - start)
        costs += state.constraints.costs(samples, state.score(answers))["utility"]
    state.constraints.set_reference(costs, exit_layers)
