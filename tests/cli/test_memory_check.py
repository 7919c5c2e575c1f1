"""What was planned is said before the work, what was used beside it in the end; both are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from exitsafe.cli.main import run
from exitsafe.cli.memory_check import MemoryCheck, check_align, largest_peaks
from exitsafe.doctor import Part, Plan
from exitsafe.judges.reward_model import RewardModel
from exitsafe.lppo import LPPOConfig, Watch
from exitsafe.vlm.peak import Gauge
from tests.doctor.test_judge_weights import reward_model  # noqa: F401
from tests.judges.tiny_judges import rule_guard  # noqa: F401
from tests.lppo.conftest import make_samples

CPU = torch.device("cpu")
MIB = 2**20


def plan_of(num_bytes: int, *, free: int) -> Plan:
    return Plan(
        device=(Part(name="weights", bytes=num_bytes),),
        host=(),
        cache_per_row=1,
        rows=1,
        rows_that_fit=1,
        free=free,
        is_host=True,
    )


@pytest.mark.usefixtures("rule_guard")
def test_audit_and_align_say_and_keep_both(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--suite", str(suite), "--layers", "1", "--max-new-tokens", "2"]
    for command in (["audit"], ["align", "--steps", "2", "--batch-size", "4"]):
        out = tmp_path / command[0]
        assert run([command[0], str(tiny_llava), *flags, *command[1:], "--out", str(out)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
        assert "planned of" in lines[0] and "used at most" in lines[1] and lines[1].endswith("planned")
        kept = json.loads((out / "memory.json").read_text())
        assert kept["planned_bytes"] > 0
        assert kept["used_bytes"] == max(0, kept["peak_process_bytes"] - kept["held_before_bytes"])
        assert run([command[0], str(tiny_llava), *flags, *command[1:], "--out", str(out)]) == 0  # finished already
        assert "memory: " not in capsys.readouterr().err
        assert json.loads((out / "memory.json").read_text()) == kept


def test_what_does_not_fit_is_said_at_once_and_the_rest_when_work_begins(capsys: pytest.CaptureFixture[str]) -> None:
    MemoryCheck(plan_of(95 * MIB, free=100 * MIB), CPU)
    assert "95.0 MiB planned of 100.0 MiB free; does not fit comfortably" in capsys.readouterr().err
    check = MemoryCheck(plan_of(10 * MIB, free=100 * MIB), CPU)
    assert capsys.readouterr().err == ""
    progress = check.saying(lambda done, total, remark: None)
    progress(0, 2, "")
    progress(1, 2, "")
    assert capsys.readouterr().err == "memory: 10.0 MiB planned of 100.0 MiB free\n"


def test_on_a_gpu_tensors_are_what_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = MemoryCheck(plan_of(10 * MIB, free=100 * MIB), CPU)
    check.keep(tmp_path, peaks={"peak_bytes": 12 * MIB, "peak_reserved_bytes": 14 * MIB})
    assert "memory: 12.0 MiB used at most (14.0 MiB reserved), 10.0 MiB planned" in capsys.readouterr().err
    assert json.loads((tmp_path / "memory.json").read_text())["used_bytes"] == 12 * MIB


def test_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    flags = ["--suite", str(suite), "--layers", "1", "--out", str(tmp_path / "run")]
    for device in ("cuda", "cuda:9"):
        assert run(["audit", str(tiny_llava), *flags, "--device", device]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"exitsafe: device {device!r}: torch sees 0 GPUs here; choose auto or cpu"]


def test_a_training_that_took_no_readings_has_nothing_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It did its last step before there were readings, and was killed before it saved its adapter."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    MemoryCheck(plan_of(10 * MIB, free=100 * MIB), CPU).keep(tmp_path, peaks=largest_peaks(tmp_path))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "memory.json").exists()


def test_a_plan_that_cannot_be_made_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = check_align(str(tmp_path), [], config=LPPOConfig(), judges=[], watch=None, loading={"device": "cpu"})
    assert check.plan is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Gauge, "read", lambda gauge: {"peak_process_bytes": check.held_before + 3 * MIB})
    check.keep(tmp_path)
    output = capsys.readouterr().err
    assert "memory was not planned: cannot read the config" in output
    assert "3.0 MiB used at most" in output


def test_an_operation_without_shapes_stops_nothing(
    tiny_llava: Path,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cannot(*arguments: object) -> None:
        raise NotImplementedError("no meta kernel for what colour is the shape")

    monkeypatch.setattr("exitsafe.doctor.typical_prompt", cannot)
    flags = ["--suite", str(suite), "--layers", "1", "--max-new-tokens", "2", "--out", str(tmp_path / "run")]
    assert run(["audit", str(tiny_llava), *flags]) == 0
    output = capsys.readouterr().err
    assert "memory was not planned: NotImplementedError while shapes were counted" in output
    assert "colour" not in output


def test_models_of_reward_and_watch_are_planned_for(
    tiny_llava: Path,
    reward_model: tuple[Path, int],  # noqa: F811
) -> None:
    folder, size = reward_model
    judge = RewardModel(str(folder), device="cpu")
    watch = Watch(samples=make_samples(), judge=judge)
    settings = {"config": LPPOConfig(), "loading": {"device": "cpu"}}
    plain, rewarded, watched = (
        check_align(str(tiny_llava), make_samples(), judges=judges, watch=look, **settings).plan  # type: ignore[arg-type]
        for judges, look in (([], None), ([judge], None), ([], watch))
    )
    assert plain is not None and rewarded is not None and watched is not None
    assert rewarded.always - plain.always == size
    assert [part.bytes for part in watched.device if part.phase == "look"] == [size]


def test_the_largest_readings_of_a_training(tmp_path: Path) -> None:
    lines = [{"step": step, "peak_bytes": peak, "peak_reserved_bytes": 9} for step, peak in enumerate((3, 7, 5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert largest_peaks(tmp_path) == {"peak_bytes": 7, "peak_reserved_bytes": 9}
