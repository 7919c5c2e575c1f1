"""What a model said, and what it was asked, is in files of mode 0600 and nowhere else, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import exitsafe
from exitsafe.cli.main import DONE, FAILED, run
from exitsafe.data import SUITE_NAMES, load_suites
from exitsafe.judges import registry
from exitsafe.lppo import LPPOConfig, align
from exitsafe.records import Response, Sample, Verdict
from exitsafe.results.run import load_run
from exitsafe.store.directory import saved_in
from tests.fake_vlm import FakeVLM, audit_fake

SUITES = ("organism-harmful", "organism-benign")
FLAGS = ("--limit", "4", "--layers", "1,3", *(word for suite in SUITES for word in ("--suite", suite)))
PUBLIC = ("run.json", "summary.json", "metrics.jsonl", "comparison.json", "chart.svg", "chart.png")


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The worst case: new files are everybody's unless the program says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Requests of the samples; answers are added by what reads them."""
    return [sample.prompt for sample in load_suites(SUITES, limit=4)]


def _texts(run_folder: Path, prompts: Sequence[str]) -> set[str]:
    """Requests and answers long enough to be no word of a table."""
    answers = [response.text for response in load_run(run_folder).responses()]
    found = {text for text in (*answers, *prompts) if len(text) > 15}
    assert any(text in found for text in answers)
    assert any(text in found for text in prompts)
    return found


def _holds(path: Path, texts: set[str]) -> bool:
    """Whether a file holds one of the texts, in its bytes or in a column."""
    content = path.read_bytes().decode(errors="replace")
    if path.suffix == ".parquet":
        content += str(pq.read_table(path).to_pylist())
    return any(text in content for text in texts)


def _check_files(folder: Path, texts: set[str]) -> set[str]:
    """The names of those that hold texts; each is its owner's alone."""
    private = {path for path in folder.rglob("*") if path.is_file() and _holds(path, texts)}
    assert [path for path in private if path.stat().st_mode & 0o777 != 0o600] == []
    return {path.name for path in private}


def test_of_a_whole_life_only_private_files_hold_texts(
    tmp_path: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    before, again = tmp_path / "before", tmp_path / "again"
    commands: list[list[str | Path]] = [
        ["audit", "organism", *FLAGS, "--out", before],
        ["judge", before, "--judge", "refusal-prefix"],
        ["label", before],
        ["verify", before, "--out", again],
        ["compare", before, again, "--out", tmp_path / "comparison.json", "--chart", tmp_path / "chart.svg"],
        ["audit", "organism", "--like", before, "--json", "--out", before],
        ["compare", before, again, "--json"],
        ["label", before, "--json"],
    ]
    for command in commands:
        assert run([str(word) for word in command]) == DONE
    printed = "".join(capfd.readouterr())
    texts = _texts(before, said)
    assert not [text for text in texts if text in printed]
    holding = _check_files(tmp_path, texts)
    assert holding == {"responses.parquet", "labels.csv"}
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"run.json", "summary.json", "comparison.json", "chart.svg"} <= names
    assert not holding & set(PUBLIC)


def test_the_label_file_leaves_the_run_only_with_leave(tmp_path: Path, said: list[str], fail: Any) -> None:
    assert run(["audit", "organism", *FLAGS, "--out", str(tmp_path / "run")]) == DONE
    outside = tmp_path / "labels.csv"
    line = fail("label", tmp_path / "run", "--out", outside)
    assert "--include-unsafe-text" in line
    assert not outside.exists()
    assert run(["label", str(tmp_path / "run"), "--out", str(outside), "--include-unsafe-text"]) == DONE
    assert "labels.csv" in _check_files(tmp_path, _texts(tmp_path / "run", said))


class Talking:
    """A judge that fails with the answer in its message."""

    name = "talking"
    measures = ("asr",)

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        raise ValueError(f"cannot judge {[response.text for response in responses]}")


def test_a_judge_that_fails_with_a_text_in_its_message_does_not_print_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setitem(registry._JUDGES, "talking", registry._Entry(make=lambda _, __: Talking()))
    command = ["audit", "organism", *FLAGS, "--judge", "talking", "--out", str(out)]
    assert run(command) == FAILED
    printed = "".join(capfd.readouterr())
    assert "judge talking failed (ValueError); the answers are saved" in printed
    assert "cannot judge" not in printed
    answers = saved_in(out).responses.values()
    assert _check_files(tmp_path, {answer.text for answer in answers if len(answer.text) > 15}) == {"00000.jsonl"}
    monkeypatch.setenv("EXITSAFE_DEBUG", "1")  # asks for everything there is
    assert run(command) == FAILED
    assert "cannot judge [" in capfd.readouterr().err


def test_an_error_that_nobody_foresaw_prints_its_kind_and_place_alone(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def finish(self: object, *_: object, **__: object) -> None:
        raise KeyError(said[0])

    monkeypatch.setattr("exitsafe.store.directory.RunDirectory.finish", finish)
    assert run(["audit", "organism", *FLAGS, "--out", str(tmp_path / "run")]) == FAILED
    printed = "".join(capfd.readouterr())
    assert "exitsafe: KeyError in sharing.py, line " in printed
    assert "EXITSAFE_DEBUG=1" in printed
    assert said[0] not in printed


def test_what_a_kill_leaves_is_private_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Path:
        if self.name == ".verdicts.parquet.part":
            raise KeyboardInterrupt  # as sudden as a kill: nothing is cleared away
        return rename(self, target)

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path / "run", FakeVLM(), judges=["refusal-prefix"])
    left = {path.name: path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(left) == {"run.json", "00000.jsonl", "responses.parquet", ".verdicts.parquet.part"}
    modes = {name: path.stat().st_mode & 0o777 for name, path in left.items()}
    assert modes.pop("run.json") == 0o644
    assert set(modes.values()) == {0o600}


def test_training_keeps_no_text_unless_asked(tmp_path: Path) -> None:
    seen: set[str] = set()

    def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        seen.update(text for text in (*(s.prompt for s in samples), *(r.text for r in responses)) if len(text) > 15)
        return [float(response.num_tokens) for response in responses]

    config = LPPOConfig.for_organism(
        num_steps=1, value_warmup_steps=0, batch_size=8, minibatch_size=8, max_new_tokens=12, calibration_samples=0
    )
    samples = load_suites(SUITE_NAMES, split="train", limit=8)
    align(exitsafe.load_vlm("organism"), samples, reward=reward, config=config, out=tmp_path / "lppo")
    asked = replace(config, save_completions=4)
    align(exitsafe.load_vlm("organism"), samples, reward=reward, config=asked, out=tmp_path / "asked")
    assert len(seen) > 8
    kept = [path for path in (tmp_path / "lppo").rglob("*") if path.is_file()]
    assert {"run.json", "metrics.jsonl", "adapter_model.safetensors"} <= {path.name for path in kept}
    assert not [path for path in kept if _holds(path, seen)]
    assert _check_files(tmp_path / "asked", seen) == {"completions.jsonl"}
