"""The command as a user starts it: a real process, real signals, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exitsafe.results.run import load_run
from tests.cli.conftest import write_suite
from tests.tiny_models import NUM_LAYERS, save_tiny

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def exitsafe(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exitsafe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=OFFLINE, check=False)


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_an_audit_of_a_model_folder_with_a_local_suite(family: str, suite: Path, tmp_path: Path) -> None:
    model, out = save_tiny(family, tmp_path / "model"), tmp_path / "run"
    done = exitsafe("audit", model, "--suite", suite, "--max-new-tokens", "6", "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["family"] == family
    assert [layer["exit_layer"] for layer in document["layers"]] == list(range(1, NUM_LAYERS + 1))
    assert all(layer["metrics"]["asr"]["n"] == 2 for layer in document["layers"])
    # only what people should read: what is loading, that the default judge is not there, and progress
    loading, warning, *lines = done.stderr.splitlines()
    assert loading == f"loading {model}"
    assert warning.startswith("warning: the default judge, qwen3guard, is not available")
    assert [line.split(":")[0] for line in lines] == ["Audit"]


def test_bad_input_is_one_line_and_status_2(suite: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text(suite.read_text())
    done = exitsafe("audit", "some/model", "--suite", torn, "--json", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("exitsafe: ")
    assert "row 1: image" in line


def test_an_interrupted_audit_goes_on_with_the_same_command(tiny_llava: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite", num_samples=160)
    out = tmp_path / "run"
    flags: list[str | Path] = ["--suite", suite, "--max-new-tokens", "12", "--batch-size", "8", "--out", out]
    command = [sys.executable, "-m", "exitsafe", "audit", *map(str, [tiny_llava, *flags])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=OFFLINE) as process:
        _wait_for_answers(out, process)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=300)
    assert process.returncode == 130
    assert printed == ""
    assert "exitsafe: stopping" in complaint
    assert complaint.splitlines()[-1].startswith("exitsafe: interrupted")
    assert "Traceback" not in complaint
    assert not (out / "summary.json").exists()
    saved = sum(file.stat().st_size for file in (out / "shards").iterdir())

    done = exitsafe("audit", tiny_llava, *flags)
    assert done.returncode == 0, done.stderr
    assert saved > 0
    assert len(load_run(out).responses()) == 160 * NUM_LAYERS


def _wait_for_answers(out: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if any(file.stat().st_size > 2000 for file in out.glob("shards/*")):
            return
        assert process.poll() is None, "the audit ended before it could be interrupted"
        time.sleep(0.05)
    raise AssertionError("no answer was saved")


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    flags = ["audit", "organism", "--limit", "6", "--json"]
    alone = exitsafe(*flags, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "exitsafe"]
    command = [sys.executable, *launch, *plain, *flags, "--out", str(tmp_path / "two")]
    both = subprocess.run(command, capture_output=True, text=True, env=OFFLINE, check=False)
    assert both.returncode == 0, both.stderr
    assert (tmp_path / "one/verdicts.parquet").read_bytes() == (tmp_path / "two/verdicts.parquet").read_bytes()
    assert len(load_run(tmp_path / "two").responses()) == 24 * 8
    one, two = (json.loads(done.stdout) for done in (alone, both))  # one document, not two
    for document in (one, two):
        document.pop("run")
        for part in (*document["layers"], *document["bins"].values()):
            part["metrics"].pop("seconds")
    assert one == two
