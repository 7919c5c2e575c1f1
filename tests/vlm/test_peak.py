"""Peaks that are read grow with what is held, and on a GPU begin anew at each reading."""

from __future__ import annotations

import pytest
import torch

from exitsafe.vlm.peak import MEASURED, Gauge, resident_bytes

CPU = torch.device("cpu")


def test_the_process_peak_grows_with_what_is_held_and_never_falls() -> None:
    gauge = Gauge(CPU)
    (before,) = gauge.read().values()
    resident = resident_bytes()
    assert before >= 0.9 * resident > 10 * 2**20  # the kernel counts in portions
    held = torch.ones((before - resident) // 4 + 2**26)  # 256 MiB above the peak so far
    (during,) = gauge.read().values()
    del held
    (after,) = gauge.read().values()
    assert during >= before + 2**27
    assert after >= during


def test_names_say_what_was_measured() -> None:
    assert set(Gauge(CPU).read()) == {"peak_process_bytes"} < set(MEASURED)


@pytest.mark.gpu
def test_on_a_gpu_each_reading_is_of_its_own_time() -> None:
    gauge = Gauge(torch.device("cuda"))
    gauge.read()
    held = torch.ones(2**26, device="cuda")
    del held
    first, second = gauge.read(), gauge.read()
    assert first["peak_bytes"] >= 2**28 > second["peak_bytes"]
    assert first["peak_reserved_bytes"] >= first["peak_bytes"]
