"""One adapter per exit from the command line: align, audit, compare, rerun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run
from tests.cli.conftest import write_suite
from tests.cli.test_rewards import Stub
from tests.judges.tiny_judges import rule_guard  # noqa: F401

pytestmark = pytest.mark.usefixtures("rule_guard")
QUICK = "value_warmup_steps: 1\nminibatch_size: 4\nlppo:\n  lora_rank: 2\n  lora_alpha: 4\n  learning_rate: 1.0\n"


def test_the_folder_is_audited_compared_and_audited_again(
    tiny_llava: Path, suite: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quick.yaml").write_text(QUICK + "adapters: per-layer\n")  # the flag's name, as for every flag
    out = tmp_path / "lppo"
    flags = ["--config", str(tmp_path / "quick.yaml"), "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4"]
    align = ["align", str(tiny_llava), "--suite", str(suite), "--layers", "1-2", *flags, "--out", str(out)]
    assert run([*align, "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert document["settings"]["trained_exits"] == [1, 2]
    assert document["adapter"] == str(out / "adapter")
    assert sorted(document["result"]["exits"]) == ["1", "2"]
    assert document["last_step"]["exit_layer"] == 2
    assert "exit 2 (2 of 2): reward" in output.err
    assert run(align) == 0
    output = capsys.readouterr()
    assert f"{out} was finished already: nothing was done" in output.err
    assert f"Adapter: {out / 'adapter'}" in output.out

    after = tmp_path / "after"
    audit = ["audit", str(tiny_llava), "--adapter", str(out / "adapter"), "--like", str(audited), "--out", str(after)]
    assert run(audit) == 0
    words = "has no adapter for exits 3-6, which answer with the base model"
    assert capsys.readouterr().err.count(words) == 1
    assert run(["compare", str(audited), str(after)]) == 0
    assert "8 samples at 3 exit layers in both runs." in capsys.readouterr().out
    assert run(["rerun", str(after)]) == 0
    assert "24 of 24 answers and 66 of 66 verdicts of this call are the same" in capsys.readouterr().out
    answers = [answers_of(folder) for folder in (audited, after)]
    assert answers[0][5] == answers[1][5], "exit 5 has no adapter"
    assert answers[0][1] != answers[1][1] and answers[0][2] != answers[1][2]


def answers_of(folder: Path) -> dict[int, dict[str, str]]:
    """By exit layer and sample."""
    from exitsafe.runs import load_run

    found: dict[int, dict[str, str]] = {}
    for response in load_run(folder).responses():
        found.setdefault(response.exit_layer, {})[response.sample_id] = response.text
    return found


def test_what_a_watch_chose_is_said_of_each_exit(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.judges.harmbench.HarmBench", lambda *_, **__: Stub("harmbench", "asr"))
    suite = write_suite(tmp_path / "suite", num_samples=16)
    (tmp_path / "quick.yaml").write_text(QUICK + "watch_every: 1\nwatch_judge: harmbench\n")
    flags = ["--config", str(tmp_path / "quick.yaml"), "--steps", "2", "--batch-size", "4", "--max-new-tokens", "2"]
    flags += ["--adapters", "per-layer", "--layers", "1-2", "--out", str(tmp_path / "run")]
    assert run(["align", str(tiny_llava), "--suite", str(suite), *flags]) == 0
    said = capsys.readouterr().out
    assert said.count("Exit 1: The adapter is from step ") == said.count("Exit 2: The adapter is from step ") == 1


def test_bad_settings(tiny_llava: Path, suite: Path, tmp_path: Path, fail: Any) -> None:
    align = ["align", tiny_llava, "--suite", suite, "--out", tmp_path / "run"]
    assert "adapters='each' is unknown; choose shared or per-layer" in fail(*align, "--adapters", "each")
    (tmp_path / "bad.yaml").write_text("default_share: 0.2\n")
    bad = fail(*align, "--adapters", "per-layer", "--config", tmp_path / "bad.yaml")
    assert "default_share means nothing with adapters='per-layer'" in bad
    assert not (tmp_path / "run").exists()
