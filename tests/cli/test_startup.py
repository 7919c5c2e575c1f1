"""What only reads finished runs, and every wrong argument, answers without loading torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CODE = """
import json, sys
from exitsafe.cli.main import run
for statuses, arguments in json.loads(sys.argv[1]):
    status = run(arguments)
    loaded = sorted({"torch", "transformers", "scipy.stats"} & set(sys.modules))
    assert not loaded, (arguments, loaded)
    assert str(status) in statuses, (arguments, status)
    print("\\0", end="", file=sys.stderr)
"""


def light(lines: Sequence[tuple[str, list[str]]], *, run: Path, cwd: Path) -> list[str]:
    """Run command lines, each with the statuses it may end with, in one process of their own; what each said."""
    filled = [(statuses, [str(run) if word == "RUN" else word for word in words]) for statuses, words in lines]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(filled)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split("\0")[:-1]


READING = [
    ("012", ["gate", "RUN", "--max-asr", "0.5"]),
    ("0", ["compare", "RUN", "RUN"]),
    ("0", ["label", "RUN", "--out", "labels.csv", "--include-unsafe-text"]),
    ("0", ["suites"]),
    ("0", ["suites", "xstest"]),
    ("0", ["report", "RUN", "--out", "page.html"]),
]
WRONG = [
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
    (["verify", "here", "--limit", "3"], "--limit applies only to an exported checkpoint"),
    (["recommend", "here", "--max-asr", "0.1"], "is not a run directory"),
    (["verify", ".", "--against", "RUN", "--out", "again"], "--out applies only to repeating a run"),
]


def test_reading_runs_and_wrong_arguments(audited: Path, tmp_path: Path) -> None:
    (tmp_path / "here" / "adapter").mkdir(parents=True)
    (tmp_path / "here" / "metrics.jsonl").touch()
    (tmp_path / "here" / "adapter" / "adapter_config.json").write_text("{}")
    found = light([*(("2", line) for line, _ in WRONG), *READING], run=audited, cwd=tmp_path)
    assert all(found)
    for (line, words), said in zip(WRONG, found, strict=False):
        assert words in said, line
