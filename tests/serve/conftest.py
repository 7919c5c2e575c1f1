from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.served import Served, serving
from tests.serve.worldly import organism


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """The organism, served."""
    with serving(organism()) as served:
        yield served
