"""How far does training at some exits reach the others? Train-exits x test-exits, as a matrix of audits.

Each row is one L-PPO run at exactly the exits named, audited at all test exits; the first row is the untrained model.
Knows nothing about how a run trains or an audit judges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exitsafe.errors import InputError, RunError
from exitsafe.judges import Judge
from exitsafe.lppo import LPPOConfig, Reward, WeightedSum, align
from exitsafe.lppo.scorer import as_scorer
from exitsafe.records import Progress, Sample
from exitsafe.runs import AuditRun
from exitsafe.runs.files import write_whole
from exitsafe.sweep import audit
from exitsafe.vlm import VLM, ExitLayers, resolve_layers

DEFAULT_CONFIG = LPPOConfig()
METRICS = ("asr", "over_refusal", "vqa_accuracy")
UNTRAINED = "untrained"
RECORD = "transfer.json"

Stage = Callable[[str, str], AbstractContextManager[Progress | None]]
"""`stage(title, unit)`: a progress callback for the time of one training or audit."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The matrix.

    Attributes:
        test_exits: Its columns.
        rows: By name of the set trained on (`untrained` first): the exits trained on, the audit's folder, and by metric
            the estimates (value, low, high, n, unscored) in the order of `test_exits`, None where there is none.
    """

    test_exits: tuple[int, ...]
    rows: Mapping[str, Mapping[str, Any]]

    def estimate(self, row: str, metric: str, exit_layer: int) -> Mapping[str, Any] | None:
        """One cell, e.g. `("1,3", "asr", 8)`."""
        found: Mapping[str, Any] | None = self.rows[row]["metrics"][metric][self.test_exits.index(exit_layer)]
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "test_exits": list(self.test_exits),
            "rows": [{"train_set": name, **row} for name, row in self.rows.items()],
        }


def transfer(
    load: Callable[[Path | None], VLM],
    train_sets: Sequence[str],
    *,
    train_samples: Sequence[Sample],
    test_samples: Sequence[Sample],
    reward: Reward | Judge | WeightedSum | None = None,
    config: LPPOConfig = DEFAULT_CONFIG,
    judges: Sequence[Judge | str] | None = None,
    test_exits: ExitLayers = "all",
    max_new_tokens: int | None = None,
    out: str | Path,
    origin: Callable[[Path | None], Mapping[str, Any]] | None = None,
    stage: Stage = lambda title, unit: nullcontext(None),
) -> Transfer:
    """Train on each set of exits, audit each, and put the matrix together.

    Every training and audit has its own folder and goes on where it stopped; started again, what is done is done.

    Args:
        load: The model, without an adapter (None) or with one; called for each training and each audit.
        train_sets: Sets of exits as text, e.g. `["1", "1-3,7", "all"]`. Exactly these are trained on: the default exit
            is not added.
        train_samples, reward, config: As for `align`; exits and `include_default` of the config are not read.
        test_samples, judges, max_new_tokens: As for `audit`.
        origin: By adapter, what `audit` keeps as the origin of the run.
        test_exits: The columns.
        out: Folder for `audit-SET`, `train-SET` and `transfer.json`.
        stage: Called for each training and audit with a title and its unit.

    Returns:
        The matrix, which `out/transfer.json` holds too.

    Raises:
        InputError: If a set cannot be read or comes twice.
        RunError: If a folder holds another run.
    """
    out = Path(out)
    as_scorer(reward, train_samples)  # a judge that is not available says so before the first audit
    vlm = load(None)
    columns = resolve_layers(test_exits, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    sets = _read_sets(train_sets, vlm)
    _check_folder(out)

    def test(vlm: VLM, name: str, adapter: Path | None) -> AuditRun:
        with stage(f"Audit: {name}", "answer") as progress:
            return audit(
                vlm,
                test_samples,
                judges=judges,
                exit_layers=columns,
                out=out / f"audit-{_folder_name(name)}",
                max_new_tokens=max_new_tokens,
                seed=config.seed,
                origin=None if origin is None else origin(adapter),
                progress=progress,
            )

    rows = {UNTRAINED: _row((), test(vlm, UNTRAINED, None), columns)}
    del vlm  # two models need not fit side by side
    for name, exits in sets.items():
        only_these = replace(config, exit_layers=exits, include_default=False)
        folder = out / f"train-{_folder_name(name)}"
        with stage(f"Train: {name}", "step") as progress:
            adapter = align(load(None), train_samples, reward=reward, config=only_these, out=folder, progress=progress)
        rows[name] = _row(exits, test(load(adapter), name, adapter), columns)
    found = Transfer(test_exits=columns, rows=rows)
    write_whole(out / RECORD, json.dumps(found.to_json(), indent=1, allow_nan=False).encode() + b"\n")
    return found


def _read_sets(train_sets: Sequence[str], vlm: VLM) -> dict[str, tuple[int, ...]]:
    """By name, the exits of each set; two names of one set are refused."""
    found: dict[str, tuple[int, ...]] = {}
    for name in (text.strip() for text in train_sets):
        exits = resolve_layers(name, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
        twin = next((other for other, same in found.items() if same == exits), None)
        if twin is not None:
            raise InputError(f"train sets {twin!r} and {name!r} are the same exits: leave one out")
        found[name] = exits
    if not found:
        raise InputError('no train set is given; write for example "1;3;5;7;all"')
    return found


def _check_folder(out: Path) -> None:
    if not out.exists():
        return
    own = ("audit-", "train-", RECORD, f".{RECORD}")
    if not out.is_dir() or any(not entry.name.startswith(own) for entry in out.iterdir()):
        raise RunError(f"{out} holds something else than transfer runs: choose a new or empty folder")


def _folder_name(name: str) -> str:
    """`1-3, 7` -> `1-3_7`."""
    return "".join(name.split()).replace(",", "_")


def _row(exits: tuple[int, ...], run: AuditRun, columns: Sequence[int]) -> dict[str, Any]:
    by_layer = {entry["exit_layer"]: entry["metrics"] for entry in run.summary["layers"]}
    metrics = {metric: [by_layer[layer].get(metric) for layer in columns] for metric in METRICS}
    mean = {metric: run.summary["bins"]["average"]["metrics"].get(metric) for metric in METRICS}
    return {"train_exits": list(exits), "run": str(run.path), "metrics": metrics, "mean": mean}
