"""What only reads finished runs, and every wrong argument, answers without loading torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from exitsafe.cli.main import run
status = run(sys.argv[2:])
loaded = sorted({"torch", "transformers", "scipy.stats"} & set(sys.modules))
assert not loaded, loaded
assert str(status) in sys.argv[1], status
"""


def light(statuses: str, *arguments: str | Path, cwd: Path) -> str:
    """Run a command in a process of its own; what it printed."""
    command = [sys.executable, "-c", CODE, statuses, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["gate", "RUN", "--max-asr", "0.5"],
        ["compare", "RUN", "RUN"],
        ["report", "RUN", "--out", "page.html"],
        ["label", "RUN", "--out", "labels.csv", "--include-unsafe-text"],
        ["suites"],
        ["suites", "xstest"],
    ],
    ids=" ".join,
)
def test_a_command_that_reads_finished_runs(arguments: list[str], audited: Path, tmp_path: Path) -> None:
    assert light(
        "012" if arguments[0] == "gate" else "0",
        *(audited if each == "RUN" else each for each in arguments),
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gate", "nowhere", "--max-asr", "0.1"], "nowhere is not a folder"),
        (["audit", "organism", "--lik", "runs/x"], "--like"),
        (["audti"], "audit"),
        (["audit", "organism", "--suite", "xtest", "--out", "x"], "suite 'xtest' is unknown"),
        (["audit", "organism", "--judge", "nobody", "--out", "x"], "judge 'nobody' is unknown"),
        (["audit", "./slim", "--suite", "organism-vqa", "--out", "x"], "./slim does not exist"),
        (["audit", "here/slim", "--suite", "organism-vqa", "--out", "x"], "here/slim does not exist"),
        (["audit", "organism", "--adapter", "here", "--out", "x"], "did you mean here/adapter?"),
        (["audit", "here/adapter", "--suite", "organism-vqa", "--out", "x"], "here/adapter as --adapter"),
        (["doctor", "/nowhere/model"], "/nowhere/model does not exist"),
        (["chat", "organism"], "give --image FILE"),
        (["verify", "nowhere"], "nowhere does not exist"),
        (["verify", "here", "--limit", "3"], "--limit is for an exported checkpoint"),
        (["recommend", "here", "--max-asr", "0.1"], "is not a run directory"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_wrong_argument(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "here" / "adapter").mkdir(parents=True)
    (tmp_path / "here" / "metrics.jsonl").touch()
    (tmp_path / "here" / "adapter" / "adapter_config.json").write_text("{}")
    assert said in light("2", *arguments, cwd=tmp_path)


def test_the_list_of_arguments_that_belong_to_the_other_kind_of_verify(audited: Path, tmp_path: Path) -> None:
    said = light("2", "verify", tmp_path, "--against", audited, "--out", "again", cwd=tmp_path)
    assert "--out is for repeating a run" in said
