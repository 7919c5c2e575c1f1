"""Signals: noted while something is under way, acted on at once elsewhere, handlers put back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig, align
from exitsafe.lppo.interrupt import noted_signals
from exitsafe.records import Sample
from tests.lppo.conftest import CountRed, tiny_config
from tests.lppo.test_trainer import assert_same_run, metrics_of


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_a_second_one_does_not(number: int) -> None:
    before = handlers()
    with noted_signals() as stop:
        assert handlers() != before
        stop.message = "later"
        send(number)
        assert stop.is_asked
        with pytest.raises(KeyboardInterrupt, match="later"):
            send(number)
    assert handlers() == before


def test_where_nothing_is_lost_a_signal_acts_at_once_also_an_earlier_one() -> None:
    with noted_signals() as stop:
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            send(signal.SIGTERM)
        assert not stop.is_asked
        send(signal.SIGTERM)
        reached = False
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            reached = True
        assert not reached


def test_handlers_are_put_back_after_an_error_and_ignored_signals_stay_ignored() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), noted_signals():
        _ = 1 / 0
    assert handlers() == before
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with noted_signals() as stop:
            send(signal.SIGTERM)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGTERM, old)


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with noted_signals() as stop:
            seen.append((handlers(), stop.is_asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_under_way_and_the_run_ends_the_same(
    vlm: VLM, samples: list[Sample], whole_run: Path, tmp_path: Path, number: int
) -> None:
    config: LPPOConfig = tiny_config(checkpoint_every=100)
    before = handlers()
    with pytest.raises(KeyboardInterrupt, match="rerun the same command to resume from step 3 of 4"):
        align(vlm, samples, reward=CountRed(2, lambda: send(number)), config=config, out=tmp_path / "cut")
    assert handlers() == before
    assert len(metrics_of(tmp_path / "cut")) == 3
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000003.ckpt"]
    calls = CountRed()
    align(vlm, samples, reward=calls, config=config, out=tmp_path / "cut")
    assert calls.calls_left == -1 - 1  # nothing was done twice
    assert_same_run(whole_run, tmp_path / "cut")
    assert handlers() == before
