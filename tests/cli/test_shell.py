"""The command as a user starts it: a real process, real signals, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from exitsafe.cli import models
from exitsafe.cli.main import main, run
from exitsafe.results.run import load_run
from tests.cli.conftest import write_suite
from tests.forks import fork, together, wait
from tests.tiny_models import NUM_LAYERS, save_tiny

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def exitsafe(*arguments: str | Path, module: Sequence[str] = ("exitsafe",)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=OFFLINE, check=False)


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_an_audit_of_a_model_folder_with_a_local_suite(
    family: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny(family, tmp_path / "model"), tmp_path / "run"
    capsys.readouterr()
    assert run(["audit", str(model), "--suite", str(suite), "--max-new-tokens", "6", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["family"] == family
    assert [layer["exit_layer"] for layer in document["layers"]] == list(range(1, NUM_LAYERS + 1))
    assert all(layer["metrics"]["asr"]["n"] == 2 for layer in document["layers"])
    assert_for_people(printed.err, model, "Audit")


def assert_for_people(said: str, model: Path, *others: str) -> None:
    """Only what people should read: what is loading, that the default judge is not there, and the other lines.

    A slow machine also says how far it has come.
    """
    usual = ("checked its ", *(() if "Audit" in others else ("Audit: ",)))
    loading, warning, *lines = (line for line in said.splitlines() if not line.startswith(usual))
    assert loading == f"loading {model}"
    assert warning.startswith("warning: the default judge, qwen3guard, is not available")
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == list(others)


def test_bad_input_is_one_line_and_status_2(suite: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text(suite.read_text())
    done = exitsafe("audit", "some/model", "--suite", torn, "--json", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("exitsafe: ")
    assert "row 1: image" in line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_interrupted_audit_goes_on_with_the_same_command(tiny_llava: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite", num_samples=80)
    out = tmp_path / "run"
    flags = ["--suite", suite, "--max-new-tokens", "12", "--batch-size", "8", "--out", out]
    arguments = ["audit", *map(str, [tiny_llava, *flags])]
    complaint = tmp_path / "complaint"

    def start() -> None:
        os.dup2(os.open(complaint, os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        models._say_once.cache_clear()  # what other tests have loaded
        sys.argv[1:], sys.stdout, sys.stderr = arguments, os.fdopen(1, "w"), os.fdopen(2, "w")
        with pytest.raises(SystemExit, match="130"):
            main()

    child = fork(start)
    _wait_for_answers(out)
    os.kill(child, signal.SIGINT)
    assert wait([child]) == [0]
    lines = complaint.read_text().splitlines()
    assert lines[-1].startswith("exitsafe: interrupted")
    assert lines[-2].startswith("exitsafe: stopping")
    assert_for_people("\n".join(lines[:-2]), tiny_llava)
    assert not (out / "summary.json").exists()
    assert sum(file.stat().st_size for file in (out / "shards").iterdir()) > 0

    assert run(arguments) == 0
    assert len(load_run(out).responses()) == 80 * NUM_LAYERS


def _wait_for_answers(out: Path) -> None:
    for _ in range(12_000):
        if any(file.stat().st_size > 0 for file in out.glob("shards/*")):
            return
        time.sleep(0.01)
    raise AssertionError("no answer was saved")


FLAGS = ["audit", "organism", "--limit", "2", "--layers", "1,7", "--json", "--out"]


def assert_equal_runs(folder: Path, one: str, two: str) -> None:
    """Of the runs `one` and `two` in the folder: equal verdicts, and equal documents but for times."""
    assert (folder / "one/verdicts.parquet").read_bytes() == (folder / "two/verdicts.parquet").read_bytes()
    assert len(load_run(folder / "two").responses()) == 8 * 2
    documents = [json.loads(document) for document in (one, two)]  # one document, not two
    for document in documents:
        document.pop("run")
        for part in (*document["layers"], *document["bins"].values()):
            part["metrics"].pop("seconds")
    assert documents[0] == documents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_give_what_one_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(number: int) -> None:
        with (tmp_path / f"printed-{number}").open("w") as file, redirect_stdout(file):
            assert run([*FLAGS, str(tmp_path / "two")]) == 0

    capsys.readouterr()
    assert run([*FLAGS, str(tmp_path / "one")]) == 0
    together(2, work)
    assert (tmp_path / "printed-1").read_text() == ""
    assert_equal_runs(tmp_path, capsys.readouterr().out, (tmp_path / "printed-0").read_text())


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_give_what_one_gives(tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "exitsafe"]
    alone, both = exitsafe(*FLAGS, tmp_path / "one"), exitsafe(*FLAGS, tmp_path / "two", module=[*launch, *plain])
    for done in (alone, both):
        assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, alone.stdout, both.stdout)
