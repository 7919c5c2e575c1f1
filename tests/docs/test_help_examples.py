"""Every example of the commands' help, run for real on the organism, in the order in which a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exitsafe.data.images import open_image
from exitsafe.world import organism_suites
from tests.docs.test_commands import examples

FIRST = ("audit", "align", "translate", "export")  # what later ones rest on
ELSEWHERE = {
    "demo": "tests/cli/test_demo.py runs it",
    "serve": "tests/serve runs it; it never ends by itself",
}
FILLS_IN = "--read"  # a person fills in the file before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_example_of_the_help_runs(tmp_path: Path) -> None:
    (sample,) = organism_suites(split="heldout", sizes={"harmful": 0, "borderline": 0, "benign": 0, "vqa": 1})
    open_image(sample.images[0], sample.id).save(tmp_path / "f.png")
    wanted = [line for line in examples() if line[0] not in ELSEWHERE and FILLS_IN not in line]
    wanted.sort(key=lambda line: FIRST.index(line[0]) if line[0] in FIRST else len(FIRST))
    after = ["audit", "organism", "--adapter", "runs/lppo/adapter", "--like", "runs/before", "--out", "runs/after"]
    wanted.insert(2, after)
    for line in wanted:
        done = exitsafe(line, tmp_path)
        assert done.returncode == 0 or (line[0] == "gate" and done.returncode == 1), (line, done.stderr[-300:])
    assert (tmp_path / "report.html").is_file()
    assert len(wanted) > 12


def exitsafe(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    typed = "what colour is the left shape ?\n" if line[0] == "chat" else ""
    command = [sys.executable, "-m", "exitsafe", *line]
    return subprocess.run(
        command, cwd=folder, env=environment, input=typed, capture_output=True, text=True, check=False
    )
