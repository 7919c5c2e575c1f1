"""Experiment trackers through Accelerate: each step's numbers to TensorBoard, trackio or Weights & Biases.

Only numbers are sent: no text, no prompt, no setting. The JSON lines in the run's folder are written in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from exitsafe.errors import InputError
from exitsafe.machine.processes import this_process
from exitsafe.store.files import write_whole

TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "exitsafe"

Track = Callable[[Mapping[str, object], int], None]
"""Takes a step's metrics and its number."""


@contextmanager
def tracking(names: Sequence[str], folder: Path, *, first_step: int = 0) -> Iterator[Track]:
    """Start trackers, yield a function that logs to all of them, and finish them, also after an error.

    Only the first of several processes logs. TensorBoard writes to `folder/tensorboard`; the other runs are named after
    the folder and resume when the training resumes.

    Args:
        names: From `TRACKERS`, or registered by `accelerate.tracking.register_tracker_class`.
        folder: The run's folder.
        first_step: The step that the training resumes from; later ones that were tracked are superseded.

    Raises:
        InputError: As `check_trackers`.
    """
    check_trackers(names)
    with ExitStack() as started:
        trackers = []
        if names and this_process().is_main_process:
            for name in dict.fromkeys(names):
                trackers.append(_start(name, folder, first_step))
                started.callback(trackers[-1].finish)

        def track(metrics: Mapping[str, object], step: int) -> None:
            if trackers:
                numbers = as_numbers(metrics)
                for tracker in trackers:
                    tracker.log(numbers, step=step)

        yield track


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that is unknown, or whose package is missing."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(
                f"tracker {name!r} is unknown; choose {', '.join(TRACKERS)} or one registered by "
                "accelerate.tracking.register_tracker_class"
            )
        if name in TRACKERS and find_spec(name) is None:
            raise InputError(f"tracker {name} needs its package: pip install {name}")


def as_numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """The numbers among a step's metrics under flat names; everything else is left out.

    >>> as_numbers({"asr": 0.5, "asr_by_exit": {"3": 0.25}, "reward_by_kind_and_exit": {"vqa@3": 1.0}, "kl": None})
    {'asr': 0.5, 'asr/exit-3': 0.25, 'reward/vqa/exit-3': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= {f"{_plain(name)}/{_group(key)}": x for key, x in as_numbers(_by_text(value)).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = float(value)
    return numbers


def _start(name: str, folder: Path, first_step: int) -> GeneralTracker:
    make = LOGGER_TYPE_TO_CLASS[name]
    settings: dict[str, object] = {}
    if name == "tensorboard":
        settings = {"purge_step": first_step}
    elif name == "trackio":
        settings = {"name": _run_name(folder), "resume": "allow"}
    elif name == "wandb":
        settings = {"name": _run_name(folder), "id": _run_name(folder), "resume": "allow", "dir": str(folder)}
    where = {"logging_dir": str(folder)} if make.requires_logging_directory else {}
    # TensorBoard creates a folder named after the project
    tracker: GeneralTracker = make("tensorboard" if name == "tensorboard" else PROJECT, **where, **settings)
    tracker.start()
    return tracker


def _run_name(folder: Path) -> str:
    """The folder's name with a random suffix that is drawn once: other folders may have the same name."""
    file = folder / "tracked-as.txt"
    if not file.is_file():
        write_whole(file, f"{folder.absolute().name}-{token_hex(4)}\n".encode())
    return file.read_text(encoding="utf-8").strip()


def _by_text(values: Mapping[object, object]) -> dict[str, object]:
    return {str(key): value for key, value in values.items()}


def _plain(name: str) -> str:
    """The metric of a group of values: asr_by_exit is of asr."""
    return name.split("_by_")[0]


def _group(key: str) -> str:
    """The key of a value in a group: exit layers are numbers, kinds are names, both together are kind@exit."""
    parts = key.replace("@", "/").split("/")
    return "/".join(f"exit-{part}" if part.isdigit() else part for part in parts)
