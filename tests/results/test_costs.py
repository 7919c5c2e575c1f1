from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exitsafe.engine.latency import Latency, Pass
from exitsafe.errors import RunError
from exitsafe.results.costs import NAME, Costs, Savings, audited_in, read_costs, write_costs
from exitsafe.results.run import AuditRun
from tests.weighed_runs import make_weighed


def costs_of(run: AuditRun) -> Costs:
    passes = tuple(Pass(encoder_ms=1.0 + n, prefill_ms=2.5, decode_ms_per_token=0.125) for n in range(3))
    layers = run.exit_layers
    savings = Savings(
        default_encoder=900,
        encoder={layer: 100 * layer for layer in layers},
        prefill=50,
        answer=60,
        num_answer_tokens=64,
        dropped_bytes=dict.fromkeys(layers, 7),
        model_bytes=1000,
        is_measured=True,
    )
    latency = Latency(default=passes, exits=dict.fromkeys(layers, passes))
    return Costs(audited=audited_in(run), machine={"device_name": "a CPU"}, latency=latency, savings=savings)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    run = make_weighed(tmp_path / "run", asr=[[1.0, 0.0], [0.0, 0.0]])
    assert read_costs(run) is None
    write_costs(run, costs_of(run))
    write_costs(run, replace(costs_of(run), machine={"device_name": "another"}))
    assert read_costs(run) == replace(costs_of(run), machine={"device_name": "another"})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), 2, "cannot be read"),
        (("latency", "default"), [], "cannot be read"),
        (("latency", "default"), "many", "cannot be read"),
        (("latency", "default", 0, "encoder_ms"), -1.0, "cannot be read"),
        (("latency", "default", 0, "encoder_ms"), 0.0, "cannot be read"),
        (("latency", "default", 0, "prefill_ms"), 1e308, "cannot be read"),
        (("savings", "num_answer_tokens"), 10**400, "cannot be read"),
        (("savings", "default_encoder"), 10**400, "cannot be read"),
        (("machine", "device_name"), "x" * 10_000, "cannot be read"),
        (("latency", "exits"), {}, "another model or other exits"),
        (("savings", "encoder"), {}, "another model or other exits"),
        (("savings", "default_encoder"), 0, "cannot be read"),
        (("audited", "exit_layers"), [99], "another model or other exits"),
    ],
)
def test_edited_costs_are_refused(tmp_path: Path, path: tuple[str | int, ...], value: object, words: str) -> None:
    run = make_weighed(tmp_path / "run", asr=[[1.0, 0.0], [0.0, 0.0]])
    write_costs(run, costs_of(run))
    content = json.loads((run.path / NAME).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (run.path / NAME).write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"costs\.json.*{words}.*; remove it or add --time to measure again"):
        read_costs(run)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}'])
def test_damaged_costs_are_refused(tmp_path: Path, content: str) -> None:
    run = make_weighed(tmp_path / "run", asr=[[1.0, 0.0], [0.0, 0.0]])
    (run.path / NAME).write_text(content)
    with pytest.raises(RunError, match=r"costs\.json cannot be read \(.*\); remove it or add --time to measure again"):
        read_costs(run)
