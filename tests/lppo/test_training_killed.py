"""`kill -9` at random points of a held_out run, in forks of a process that has everything loaded."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from exitsafe.engine.vlm import VLM
from exitsafe.lppo import Evaluation, align, keep_apart
from exitsafe.records import Response, Sample, Verdict
from tests.forks import fork, killed
from tests.lppo.conftest import count_red, make_samples, tiny_config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SEEN = ("metrics.jsonl", "evaluations.jsonl", "result.json", "adapter/adapter_model.safetensors")


class Fickle:
    """Judges by a hash of the text, so that any step may be the best."""

    name = "fickle"
    measures = ("asr", "refusal")

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure=measure,
                score=zlib.crc32(f"{measure} {response.text}1".encode()) % 97 / 97,
            )
            for response in responses
            for measure in self.measures
        ]


def train(vlm: VLM, out: Path) -> None:
    trained, held_out = keep_apart(make_samples(), per_kind=1)
    evaluation = Evaluation(samples=held_out, judge=Fickle(), every=2, patience=None)
    config = tiny_config(batch_size=4, minibatch_size=2, exit_layers=(2,), learning_rate=3e-2)
    align(vlm, trained, reward=count_red, config=config, evaluation=evaluation, out=out)


def content(out: Path) -> dict[str, object]:
    """Everything that a finished run leaves, times aside."""
    found: dict[str, object] = {}
    for name in SEEN:
        raw = (out / name).read_bytes()
        found[name] = [line.rpartition(b', "seconds"')[0] for line in raw.splitlines()] if "jsonl" in name else raw
    return found


def kill_after(delay: float, vlm: VLM, out: Path) -> bool:
    """Train in a fork and kill it so many seconds later; whether it was still at work."""
    child = fork(lambda: train(vlm, out))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return killed(child)


def test_killed_at_random_points_it_ends_with_the_same_adapter(vlm: VLM, tmp_path: Path) -> None:
    train(vlm, tmp_path / "warm")  # imports and caches
    started = time.perf_counter()
    train(vlm, tmp_path / "whole")
    longest = time.perf_counter() - started
    expected = content(tmp_path / "whole")
    assert content(tmp_path / "warm") == expected
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["adapter_step"] > 2
    draw = random.Random(0)
    hits = 0
    for number in range(4):
        out = tmp_path / str(number)
        hits += kill_after(draw.uniform(0.1, 1.0) * longest, vlm, out)
        train(vlm, out)
        assert content(out) == expected, f"kill {number}"
    assert hits >= 2
