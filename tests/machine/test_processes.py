from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from exitsafe.errors import RunError
from exitsafe.machine.processes import wait_for_all


def test_a_process_that_waits_for_one_that_failed_says_so() -> None:
    def wait() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    process: Any = SimpleNamespace(wait_for_everyone=wait)
    with pytest.raises(RunError, match="another process failed; its own error message says why"):
        wait_for_all(process)
