"""A llama.cpp server of two GGUF files in a child process: some bad files abort the whole process.

As a script it is that child: `python llama_server.py MODEL MMPROJ PORT CONTEXT`, in the environment that has xllamacpp.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def llama_server(model: Path, mmproj: Path | None, *, log: Path, context: int = 128) -> Iterator[str]:
    """The URL (without /v1) of a llama.cpp server while it runs.

    Args:
        model: The language model's GGUF file.
        mmproj: The encoder's and projector's; None for a text-only server.
        log: Where its output goes.
        context: Its context, in tokens.
    """
    from tests.engines.server import free_port, python_of, running

    port = free_port()
    command: list[str | Path] = [python_of("llama"), __file__, model, mmproj or "", str(port), str(context)]
    with running(command, port=port, log=log, env={"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}) as url:
        yield url


def _serve(model: str, mmproj: str, port: str, context: str) -> None:
    import signal

    import xllamacpp

    settings: Any = xllamacpp.CommonParams()
    settings.model.path = model
    settings.mmproj.path = mmproj
    settings.no_mmproj = not mmproj
    settings.n_ctx, settings.n_parallel, settings.port = int(context), 1, int(port)
    settings.mmproj_use_gpu = settings.fit_params = settings.ui = False
    settings.use_jinja = True
    settings.cache_ram_mib = 0
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
