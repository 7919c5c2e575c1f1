"""The example workflow and rules: real keys, real commands, and no file that holds what a model said."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from exitsafe.cli.main import run
from exitsafe.gate import read_rules
from exitsafe.results.limits import Level
from tests.gate.gate_runs import rows, write_run

EXAMPLES = Path(__file__).parents[2] / "examples" / "gate"
TAKEN_ALONG = {"gate.xml", "${{ runner.temp }}/after/summary.json"}


def _steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load((EXAMPLES / "workflow.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps: list[dict[str, Any]] = workflow["jobs"]["gate"]["steps"]
    return steps


def test_only_githubs_own_actions_and_no_answers_leave_the_runner() -> None:
    used = {step["uses"].partition("@")[0]: step for step in _steps() if "uses" in step}
    assert set(used) == {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
    assert set(used["actions/upload-artifact"]["with"]["path"].split("\n")) - {""} == TAKEN_ALONG


@pytest.mark.parametrize(("attacks", "status"), [(0, 0), (100, 1)])
def test_its_gate_runs_as_written(attacks: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [step["run"] for step in _steps() if "exitsafe gate" in step.get("run", "")]
    scores = {
        "asr": rows(200, bad=attacks, num_exits=6),
        "refusal": rows(100, num_exits=6),
        "vqa_accuracy": rows(100, good=1.0, num_exits=6),
        "coherence": rows(200, good=1.0, num_exits=6),
    }
    write_run(tmp_path / "after", scores, categories=["a", "b"])
    summary = tmp_path / "summary.md"
    words = shlex.split(command.replace("$RUNNER_TEMP", str(tmp_path)).replace("$GITHUB_STEP_SUMMARY", str(summary)))
    rules = words.index("examples/gate/rules.yaml")
    words[rules] = str(EXAMPLES / "rules.yaml")
    monkeypatch.chdir(tmp_path)
    assert run(words[1:]) == status
    assert Path("gate.xml").exists()
    assert summary.exists()


def test_the_rules_say_how_many_samples_they_need() -> None:
    text = (EXAMPLES / "rules.yaml").read_text(encoding="utf-8")
    rules, _ = read_rules(EXAMPLES / "rules.yaml")
    needed = [str(Level().fewest_samples(rule.limit)) for rule in rules[:3]]
    assert [line.rpartition("needs ")[2].split()[0] for line in text.splitlines() if "; needs " in line] == needed
