"""A run's memory: what `exitsafe doctor` plans for it, said when the work begins, and what was used, in the end.

Both are kept in the run's memory.json. Of several processes the first plans; what it says holds for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console, defaults
from exitsafe.cli.doctor_tables import readable
from exitsafe.errors import ExitsafeError, ModelError

if TYPE_CHECKING:
    import torch

    from exitsafe.cli.audit_plan import AuditPlan
    from exitsafe.doctor import Blueprint, Plan
    from exitsafe.judges import Judge
    from exitsafe.lppo import LPPOConfig, Watch
    from exitsafe.records import Progress, Sample

RECORD = "memory.json"


class MemoryCheck:
    """A plan, and a look at what this process holds before the model is there.

    A plan that does not fit is said before the model is loaded, which may fail for it; any other once nothing is left
    that could be refused.
    """

    def __init__(self, plan: Plan | None, device: torch.device, *, problem: str = "") -> None:
        from exitsafe.vlm.peak import Gauge, resident_bytes

        self.plan, self.problem = plan, problem
        self.held_before = resident_bytes()
        self.gauge = Gauge(device)
        self._is_said = plan is None
        if plan is not None and not plan.fits:
            self._say("does not fit comfortably: exitsafe doctor shows the parts and what makes them less")

    def saying(self, progress: Progress) -> Progress:
        """The same progress, and at its first word the plan."""

        def say_and_go_on(done: int, total: int, remark: str) -> None:
            self._say()
            progress(done, total, remark)

        return say_and_go_on

    def _say(self, remark: str = "") -> None:
        if not self._is_said and self.plan is not None:
            planned = f"memory: {readable(self.plan.peak)} planned of {readable(self.plan.free or 0)} free"
            console.note("; ".join(filter(None, [planned, remark])))
        self._is_said = True

    def keep(self, out: Path, *, peaks: Mapping[str, int] | None = None) -> None:
        """Say what was used beside what was planned, and write both to `out`.

        Args:
            out: The run's folder.
            peaks: The largest readings by name; None reads them now. Without any, nothing is said: a training may have
                done all its steps when they were not taken yet.
        """
        from exitsafe.runs.files import write_whole

        peaks = dict(self.gauge.read() if peaks is None else peaks)
        if console.process_number() > 0 or not peaks:
            return
        if self.plan is None:  # said now: a model that cannot be loaded has one line, which says the same
            console.note(f"memory was not planned: {self.problem}")
        used = peaks.get("peak_bytes")
        told = f"{readable(peaks.get('peak_reserved_bytes', 0))} reserved"
        if used is None:
            used = max(0, peaks["peak_process_bytes"] - self.held_before)
            told = f"by the process, beyond the {readable(self.held_before)} that it held without the model"
        planned = None if self.plan is None else self.plan.peak
        beside = "" if planned is None else f", {readable(planned)} planned"
        console.note(f"memory: {readable(used)} used at most ({told}){beside}")
        content = {"planned_bytes": planned, "used_bytes": used, "held_before_bytes": self.held_before, **peaks}
        write_whole(out / RECORD, json.dumps(content, indent=1).encode() + b"\n")


def check_align(
    model: str,
    samples: Sequence[Sample],
    *,
    config: LPPOConfig,
    judges: Sequence[Judge],
    watch: Watch | None,
    loading: Mapping[str, Any],
) -> MemoryCheck:
    """Plan an L-PPO run whose reward has these judges."""
    from exitsafe.doctor import align_plan, judge_bytes, typical_prompt
    from exitsafe.judges import load_judges
    from exitsafe.lppo.sampler import trained_exits

    def plan(blueprint: Blueprint, device: torch.device, free: int) -> Plan:
        watching = None
        if watch is not None:
            evaluating = load_judges([watch.judge]) if isinstance(watch.judge, str) else [watch.judge]
            watching = judge_bytes(evaluating, on=device)
        return align_plan(
            blueprint,
            typical_prompt(blueprint, samples),
            exit_layers=trained_exits(config, num_layers=blueprint.num_layers, default_exit=blueprint.default_exit),
            num_samples=len(samples),
            config=config,
            reward_bytes=judge_bytes(judges, on=device),
            watch_bytes=watching,
            free=free,
            is_host=device.type == "cpu",
        )

    return _check(model, loading, plan)


def check_audit(
    plan: AuditPlan, samples: Sequence[Sample], judges: Sequence[Judge] | None, *, loading: Mapping[str, Any]
) -> MemoryCheck:
    """Plan an audit."""
    from exitsafe.doctor import audit_plan, judge_bytes, typical_prompt
    from exitsafe.judges import load_judges
    from exitsafe.vlm import resolve_layers

    def make(blueprint: Blueprint, device: torch.device, free: int) -> Plan:
        beside = 0
        if plan.settings["judge_pass"] == "beside":
            is_world = all(sample.source.startswith("organism-") for sample in samples)
            usual = [] if is_world else load_judges(["qwen3guard"])
            with suppress(ModelError):  # the audit then takes a proxy without a model, and says so
                beside = judge_bytes(usual if judges is None else judges, on=device)
        return audit_plan(
            blueprint,
            typical_prompt(blueprint, samples),
            exit_layers=resolve_layers(
                plan.exit_layers, num_layers=blueprint.num_layers, default_exit=blueprint.default_exit
            ),
            max_new_tokens=plan.settings["max_new_tokens"] or defaults.MODEL_TOKENS,
            batch_size=plan.settings["batch_size"],
            judge_bytes=beside,
            adapter_bytes=_saved_bytes(loading.get("adapter")),
            free=free,
            is_host=device.type == "cpu",
        )

    return _check(plan.model, loading, make)


def largest_peaks(out: Path) -> dict[str, int]:
    """The largest readings of a training's metrics.jsonl, by name."""
    from exitsafe.lppo.folder import read_lines
    from exitsafe.vlm.peak import MEASURED

    lines = read_lines(out / "metrics.jsonl")
    found = {name: [line[name] for line in lines if isinstance(line.get(name), int)] for name in MEASURED}
    return {name: max(values) for name, values in found.items() if values}


def _check(model: str, loading: Mapping[str, Any], make: Any) -> MemoryCheck:
    """A plan that cannot be made is no reason not to run: the model itself may be loadable."""
    from exitsafe.doctor import load_blueprint
    from exitsafe.vlm.memory import free_memory
    from exitsafe.vlm.processes import own_device

    wanted = {name: loading[name] for name in _DECIDING if loading.get(name) is not None}
    device = _device(loading.get("device") or "auto", own_device)
    if console.process_number() > 0:
        return MemoryCheck(None, device)
    try:
        plan = make(load_blueprint(model, **wanted), device, free_memory(device))
    except ExitsafeError as error:
        return MemoryCheck(None, device, problem=str(error))
    except RuntimeError as error:  # torch has no shapes for an operation of this model; the message may quote inputs
        return MemoryCheck(None, device, problem=f"{type(error).__name__} while shapes were counted")
    return MemoryCheck(plan, device)


_DECIDING = ("revision", "dtype", "quantization", "trust_remote_code")


def _device(name: str, own_device: Any) -> torch.device:
    import torch

    if name == "auto":
        found: torch.device = own_device()
        return found
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown; choose auto, cpu or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs here; choose auto or cpu")
    return device


def _saved_bytes(adapter: Any) -> int:
    """Of an adapter's files, where they are here already."""
    return 0 if adapter is None else sum(file.stat().st_size for file in Path(adapter).rglob("*.safetensors"))
