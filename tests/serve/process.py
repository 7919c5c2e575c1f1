"""A real `exitsafe serve` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serve(*arguments: str, log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The process and its ready line; stderr goes to `log`. It is killed at the end if it is still there."""
    command = [sys.executable, "-m", "exitsafe", "serve", "organism", "--port", "0", "--json", *arguments]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield process, json.loads(line)
        finally:
            process.kill()
