from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exitsafe
from exitsafe.auditing import judging
from exitsafe.auditing.ticker import Ticker
from tests.auditing.test_audit_scale import Guard
from tests.fake_vlm import NUM_ROWS, SAMPLES, FakeVLM, audit_fake


def test_of_several_processes_one_counts_for_all() -> None:
    calls: list[Any] = []
    ticker = Ticker(lambda *call: calls.append(call), total=10, asr_judge=None, num_processes=3)
    ticker.tick(2)
    ticker.tick(2)  # it had a row more than the others
    ticker.complete(10)
    assert calls == [(6, 10, ""), (10, 10, ""), (10, 10, "")]


def test_what_an_earlier_start_judged_does_not_count_as_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Guard):
        def __call__(self, *asked: Any) -> Any:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*asked)

    monkeypatch.setattr(judging, "ROWS_AT_ONCE", 24)
    audit_fake(tmp_path / "further")
    for breaks, expected in ((True, [0, 24, 48]), (False, [48, 48, 48, 72])):
        calls: list[tuple[int, int]] = []
        try:
            exitsafe.judge(
                tmp_path / "further",
                SAMPLES,
                judges=[Breaks() if breaks else Guard()],
                progress=lambda done, total, _, calls=calls: calls.append((done, total)),  # type: ignore[misc]
            )
        except KeyboardInterrupt:
            assert breaks
        assert calls == [(done, NUM_ROWS) for done in expected]


def test_a_second_pass_that_was_interrupted_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Guard):
        def __call__(self, *asked: Any) -> Any:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*asked)

    monkeypatch.setattr(judging, "ROWS_AT_ONCE", 24)
    with pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path, judges=[Breaks()], judge_pass="second")
    calls: list[tuple[int, int]] = []
    audit_fake(
        tmp_path,
        FakeVLM(),
        judges=[Guard()],
        judge_pass="second",
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert calls[0] == (NUM_ROWS + 48, NUM_ROWS * 4)  # guard, vqa and coherence judge each answer
    assert calls[-1] == (NUM_ROWS * 4, NUM_ROWS * 4)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
