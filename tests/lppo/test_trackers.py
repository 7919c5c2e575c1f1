"""Trackers hold the numbers of every step and nothing else; what cannot be tracked is said before training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.lppo import align, trackers
from exitsafe.lppo.trackers import as_numbers, check_trackers, tracking
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, tiny_config


class Notebook(GeneralTracker):
    """Keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False
    logged: list[tuple[dict[str, Any], int]]
    is_open = False

    def __init__(self, project: str) -> None:
        super().__init__()
        Notebook.logged = []

    @property
    def tracker(self) -> Any:
        return self.logged

    def start(self) -> None:
        Notebook.is_open = True

    def log(self, values: dict[str, Any], step: int | None, **more: Any) -> None:
        assert step is not None
        self.logged.append((values, step))

    def finish(self) -> None:
        Notebook.is_open = False


@pytest.fixture
def notebook() -> Iterator[type[Notebook]]:
    register_tracker_class(Notebook)
    yield Notebook
    del LOGGER_TYPE_TO_CLASS["notebook"]


def test_names_are_flat_and_only_numbers_pass() -> None:
    metrics = {
        "step": 3,
        "asr": None,
        "asr_by_exit": {"1": 0.5, "12": None},
        "reward_by_kind": {"vqa": 1},
        "reward_by_kind_and_exit": {"harmful@3": -1.0},
        "reward_parts": {"count_red": 2.0},
        "exits": {4: {"asr": 0.25}},
        "is_over": True,
        "why": "<unsafe>",
    }
    assert as_numbers(metrics) == {
        "step": 3.0,
        "asr/exit-1": 0.5,
        "reward/vqa": 1.0,
        "reward/harmful/exit-3": -1.0,
        "reward_parts/count_red": 2.0,
        "exits/exit-4/asr": 0.25,
    }


def test_align_tracks_every_step_beside_its_json_lines(
    vlm: VLM, samples: list[Sample], tmp_path: Path, notebook: type[Notebook]
) -> None:
    align(vlm, samples, reward=count_red, config=tiny_config(num_steps=3), track=["notebook"], out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert notebook.logged == [(as_numbers(line), line["step"]) for line in lines]
    assert not notebook.is_open
    values = {type(value) for numbers, _ in notebook.logged for value in numbers.values()}
    assert values == {float}
    names = {name for numbers, _ in notebook.logged for name in numbers}
    exits = {exit_layer for line in lines for exit_layer in line["reward_by_exit"]}
    assert len(exits) > 3 and {f"reward/exit-{exit_layer}" for exit_layer in exits} <= names


def test_an_error_closes_the_tracker(tmp_path: Path, notebook: type[Notebook]) -> None:
    with pytest.raises(KeyboardInterrupt), tracking(["notebook"], tmp_path):
        assert notebook.is_open
        raise KeyboardInterrupt
    assert not notebook.is_open


def test_only_the_main_process_tracks(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "this_process", lambda: SimpleNamespace(is_main_process=False))
    with tracking(["notebook"], tmp_path) as track:
        track({"kl": 1.0}, 0)
        assert not notebook.is_open


def test_tensorboard_holds_the_numbers_and_redone_steps_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")

    with tracking(["tensorboard"], tmp_path) as track:
        for step in range(4):
            track({"kl": 10.0 + step, "asr_by_exit": {"3": step / 4}}, step)
    with tracking(["tensorboard"], tmp_path, first_step=2) as track:  # gone on from the checkpoint of step 2
        for step in range(2, 5):
            track({"kl": 10.0 + step, "asr_by_exit": {"3": step / 4}}, step)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"kl", "asr/exit-3"}
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(step, 10.0 + step) for step in range(5)]
    assert [event.value for event in events.Scalars("asr/exit-3")] == [step / 4 for step in range(5)]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_resumed_runs_keep_their_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Fake(Notebook):
        def __init__(self, project: str, **settings: Any) -> None:
            super().__init__(project)
            made.append({"project": project, **settings})

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda package: package)
    for folder in ("a/lppo", "a/lppo", "b/lppo"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with tracking([name], tmp_path / folder):
            pass
    first, again, other = (settings["name"] for settings in made)
    assert first == again != other
    assert first.startswith("lppo-")
    assert all(settings["project"] == "exitsafe" and settings["resume"] == "allow" for settings in made)


def test_what_cannot_be_tracked_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tracker 'paper' is unknown; choose tensorboard, trackio, wandb"):
        check_trackers(["paper"])
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(InputError, match="tracker trackio needs its package: pip install trackio"):
        check_trackers(["trackio"])


def test_a_tracker_that_is_missing_stops_align_before_anything_is_made(
    vlm: VLM, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="unknown"):
        align(vlm, samples, reward=count_red, config=tiny_config(), track=["paper"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
