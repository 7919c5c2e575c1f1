"""Faults put into the training code one at a time, in a copy, to see a test fail: `python -m tests.lppo.mutations`.

A fault of faults.yaml is a piece of source, what replaces it, and the test files of which one must notice. Prints one
line per fault; ends with status 1 if one was missed or its source is not there any more. `--only WORD` tries those
whose name has it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """One fault, as faults.yaml says it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    faults = [Fault(**fault) for fault in yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text())]
    chosen = [fault for fault in faults if arguments.only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        missed = [fault.name for fault in chosen if not is_caught(fault, copy)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)


def is_caught(fault: Fault, copy: Path) -> bool:
    """Whether a test fails under the fault. The copy is whole again afterwards."""
    file = copy / "src" / "exitsafe" / fault.file
    source = file.read_text()
    if source.count(fault.right) != 1:
        print(f"STALE   {fault.name}: {source.count(fault.right)} places in {fault.file}", flush=True)
        return False
    file.write_text(source.replace(fault.right, fault.wrong))
    try:
        status = run_tests([f"tests/{name}" for name in fault.tests], copy)
    finally:
        file.write_text(source)
    print(f"{'caught' if status == 1 else 'MISSED'}  {fault.name}", flush=True)
    return status == 1  # 1: tests ran and failed; anything else is no answer


def run_tests(files: Sequence[str], copy: Path) -> int:
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}:{copy}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    main()
