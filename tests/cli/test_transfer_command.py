from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run
from exitsafe.runs import load_run
from tests.cli.conftest import Fail, write_suite

QUICK = "value_warmup_steps: 1\nminibatch_size: 4\nlppo:\n  lora_rank: 2\n  learning_rate: 1e-3\n"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("held-out"))


@pytest.fixture(scope="module")
def flags(tiny_llava: Path, suite: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tiny steps per set, audits at exits 1 and 5."""
    config = tmp_path_factory.mktemp("config") / "lppo.yaml"
    config.write_text(QUICK)
    small = ["--config", str(config), "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4"]
    suites = ["--suite", str(suite), "--test-suite", str(held_out)]
    judges = ["--judge", "refusal-prefix", "--reward", "world-rule"]
    return ["transfer", str(tiny_llava), *suites, *judges, *small, "--layers", "1,5", "--train-sets", "1; 3-4"]


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "transfer"
    assert run([*flags, "--out", str(out)]) == 0
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_each_set_is_trained_alone_and_every_row_is_its_audit(trained: Path) -> None:
    found = read(trained / "transfer.json")
    assert found["test_exits"] == [1, 5]
    rows = {row["train_set"]: row for row in found["rows"]}
    assert {name: row["train_exits"] for name, row in rows.items()} == {"untrained": [], "1": [1], "3-4": [3, 4]}
    for name, exits in (("1", [1]), ("3-4", [3, 4])):
        settings = read(trained / f"train-{name}" / "run.json")["settings"]
        assert settings["trained_exits"] == exits, "the default exit is not added, nor what --config names"
        assert settings["config"]["lora_rank"] == 2
        adapter = trained / f"train-{name}" / "adapter"
        assert load_run(trained / f"audit-{name}").origin["loading"]["adapter"] == str(adapter.absolute())
    hashes = set()
    for name, row in rows.items():
        audit = load_run(trained / f"audit-{name}")
        assert row["run"] == str(audit.path)
        hashes.add(audit.settings["model"]["adapter"])
        by_layer = {entry["exit_layer"]: entry["metrics"] for entry in audit.summary["layers"]}
        for metric in ("asr", "over_refusal", "vqa_accuracy"):
            assert row["metrics"][metric] == [by_layer[layer][metric] for layer in (1, 5)]
            assert row["mean"][metric] == audit.summary["bins"]["average"]["metrics"][metric]
        assert {cell["n"] for cell in row["metrics"]["asr"]} == {2}
    assert len(hashes) == 3
    assert None in hashes


def test_again_is_done_at_once_and_shows_the_matrix(
    flags: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in trained.rglob("*.parquet")}
    kept |= {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    assert run([*flags, "--out", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"transfer": str(trained), **read(trained / "transfer.json")}
    assert run([*flags, "--out", str(trained)]) == 0
    output = capsys.readouterr().out
    assert "Attack success, n=2 a cell" in output
    (line,) = [line for line in output.splitlines() if "3-4" in line and "100.0%" in line][:1]
    assert line.count("*") == 0, "exits 3 and 4 are not among those audited"
    assert sum(") *" in line or ")*" in line for line in output.splitlines()) == 3, "row 1 at exit 1, in three tables"
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_bad_settings(flags: list[str], tiny_llava: Path, suite: Path, tmp_path: Path, fail: Fail) -> None:
    out = tmp_path / "transfer"
    config = tmp_path / "exits.yaml"
    config.write_text("exit_layers: [2]\n")
    refused = fail("transfer", "m", "--train-sets", "1;2", "--config", config, "--out", tmp_path / "none")
    assert "exit_layers: --train-sets names the exits here" in refused
    assert "are the same exits" in fail(*flags, "--train-sets", "1-2;2,1", "--out", out)
    assert "choose 1 to 6" in fail(*flags, "--train-sets", "1;7", "--out", out)
    assert "no exit layer is named" in fail(*flags, "--train-sets", "1;", "--out", out)
    assert "give --test-suite" in fail("transfer", tiny_llava, "--suite", suite, "--out", out)
    assert "has no suites of its own" in fail("transfer", tiny_llava, "--out", out)
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "holds something else than transfer runs" in fail(*flags, "--out", tmp_path / "mine")
