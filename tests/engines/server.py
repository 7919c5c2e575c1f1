"""A server of another program in a child process: started on a free port, awaited, and ended with all its children."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from PIL import Image

from exitsafe.records import Sample

ENGINES = Path(__file__).parents[2] / ".engines"
_LONGEST_START = 240.0  # seconds


def python_of(name: str) -> Path:
    """The interpreter of an environment that `make test-engines` made; skips the test where it could not."""
    missing = ENGINES / name / "unavailable"
    if missing.is_file():
        pytest.skip(f"{name} is not available here: {missing.read_text().strip()}")
    python = ENGINES / name / "bin" / "python"
    if not (ENGINES / name / "installed.txt").is_file():
        pytest.skip(f"{name} is not installed: run make test-engines")
    return python


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def running(command: Sequence[str | Path], *, port: int, log: Path, env: Mapping[str, str]) -> Iterator[str]:
    """The base URL of a server while it runs, once it answers on /health.

    Raises:
        RuntimeError: With the end of its log, if it ends or does not answer in time.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **env},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # as a machine that fails would
        process.wait()


def ask(url: str, sample: Sample, **settings: Any) -> Any:
    """The first choice of a greedy chat completion for a question about one picture, with log-probabilities."""
    picture, png = sample.images[0], io.BytesIO()
    assert isinstance(picture, Image.Image)
    picture.save(png, "PNG")
    image = {"url": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": sample.prompt}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "logprobs": True, **settings}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _LONGEST_START
    while process.poll() is None and time.monotonic() < until:
        with suppress(URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no server at {url}:\n{log.read_text(errors='replace')[-4000:]}")
