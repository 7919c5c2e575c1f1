from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is measured in earnest elsewhere; here its repeats would be most of the time."""
    monkeypatch.setattr("exitsafe.exporting.probe._TIMES", 1)
    monkeypatch.setattr("exitsafe.exporting.probe._WARM_UPS", 0)
