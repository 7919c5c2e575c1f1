from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import FAILED, run
from exitsafe.lppo import LPPOConfig
from exitsafe.world.profile import WORLD
from tests.judges.tiny_judges import rule_guard  # noqa: F401

pytestmark = pytest.mark.usefixtures("rule_guard")
QUICK = "value_warmup_steps: 1\nminibatch_size: 4\nlppo:\n  lora_rank: 2\n  lora_alpha: 4\n  learning_rate: 1e-3\n"


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "lppo.yaml"
    path.write_text(QUICK)
    return path


def test_an_adapter_that_audit_takes(
    tiny_llava: Path, suite: Path, audited: Path, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lppo"
    flags = ["--config", str(quick), "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4", "--seed", "5"]
    align = ["align", str(tiny_llava), "--suite", str(suite), "--layers", "1-2", *flags, "--out", str(out)]
    assert run([*align, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["adapter"] == str(out / "adapter")
    assert document["settings"]["trained_exits"] == [1, 2, 5]
    config = document["settings"]["config"]
    chosen = {"num_steps": 2, "lora_rank": 2, "learning_rate": 1e-3, "minibatch_size": 4, "seed": 5, "batch_size": 8}
    assert {name: config[name] for name in chosen} == chosen
    assert document["last_step"]["step"] == 1

    written = (out / "metrics.jsonl").read_bytes()
    assert run(align) == 0
    assert (out / "metrics.jsonl").read_bytes() == written
    output = capsys.readouterr()
    assert "--adapter" in output.out
    assert "Skipped minibatches: 0 of 8. Unscored answers: 0 of 16. Steps without a difference" in output.out
    assert f"{out} was finished already: nothing was done" in output.err
    assert run([*align, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (document["was_finished"], again["was_finished"]) == (False, True)
    wanted = {"steps": 2, "adapter_step": 2, "why": "the last step", "minibatches": 8, "skipped_minibatches": 0}
    assert document["result"] | wanted == document["result"]
    assert again == document | {"was_finished": True}

    after = ["audit", str(tiny_llava), "--adapter", str(out / "adapter"), "--like", str(audited)]
    assert run([*after, "--out", str(tmp_path / "after")]) == 0
    capsys.readouterr()
    assert run(["compare", str(audited), str(tmp_path / "after"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_samples"], [each["exit_layer"] for each in document["layers"]]) == (8, [1, 2, 5])


def test_fine_tuning_and_an_adapter_to_continue(
    tiny_llava: Path, suite: Path, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Any
) -> None:
    flags = ["--suite", str(suite), "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4"]
    align = ["align", str(tiny_llava), *flags]
    tuned = tmp_path / "sft"
    method = ["--method", "sft", "--config", "refusal=not now", "--config", "lora_rank=2", "--config", "lora_alpha=4"]
    assert run([*align, *method, "--out", str(tuned)]) == 0
    output = capsys.readouterr()
    assert "Skipped minibatches: 0 of 2." in output.out
    assert "Unscored answers" not in output.out
    line = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] == 1e-4
    assert line["loss"] > 0
    page = tmp_path / "page.html"
    assert run(["report", str(tuned), "--out", str(page)]) == 0
    assert "training by sft" in page.read_text()
    assert "does not use kl_coef: leave it out" in fail(*align, *method, "--config", "kl_coef=0.1", "--out", tuned)
    reward = fail(*align, *method, "--reward", "qwen3guard", "--out", tmp_path / "rewarded")
    assert "learns from given answers, not from a reward" in reward

    further = ["--config", str(quick), "--adapter", str(tuned / "adapter"), "--out", str(tmp_path / "further")]
    assert run([*align, *further, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["model"]["adapter"] is not None
    assert document["settings"]["config"]["reference"] == "start"
    merged = fail(*align, "--adapter", tuned, "--out", tmp_path / "wrong")
    assert f"did you mean {tuned / 'adapter'}?" in merged


def test_a_judge_as_reward_speaks_first(
    tiny_llava: Path, suite: Path, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(quick), "--steps", "2", "--batch-size", "4", "--max-new-tokens", "2", "--limit", "4"]
    quick.write_text(QUICK + "  exit_layers: [1, 3-4]\n")
    align = ["align", str(tiny_llava), "--suite", str(suite), "--reward", "world-rule", *flags]
    assert run([*align, "--out", str(tmp_path / "lppo"), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["reward"].startswith("world-rule+")
    assert settings["trained_exits"] == [1, 3, 4, 5]


def test_bad_settings(tiny_llava: Path, suite: Path, tmp_path: Path, fail: Any) -> None:
    align = ["align", tiny_llava, "--suite", suite, "--out", tmp_path / "run"]
    config = tmp_path / "bad.yaml"
    config.write_text("lppo:\n  zorb: red\n")
    assert "'lppo.zorb' is unknown; choose batch_size," in fail(*align, "--config", config)
    config.write_text("gamma: 2\n")
    assert "gamma=2 must be a number of at least 0 and at most 1" in fail(*align, "--config", config)
    assert "has no suites of its own: give --suite" in fail("align", tiny_llava, "--out", tmp_path / "run")
    assert "train='half' must be lora or full" in fail(*align, "--config", "train=half")
    assert "judge 'oracle' is unknown" in fail(*align, "--reward", "oracle")
    assert "choose 1 to 6" in fail(*align, "--layers", "9")
    assert not (tmp_path / "run").exists()


def test_help_names_the_defaults_that_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["align", "--help"]) == 0
    output = capsys.readouterr().out
    general, organism = LPPOConfig(), LPPOConfig.for_organism()
    for name in ("num_steps", "batch_size", "max_new_tokens"):
        assert f"[default: ({getattr(general, name)}; {getattr(organism, name)} for an organism)]" in output
    assert organism.max_new_tokens == WORLD.max_new_tokens


def test_a_small_batch_and_a_short_run_need_no_other_setting(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "2", "--batch-size", "4", "--max-new-tokens", "2", "--limit", "4", "--layers", "1"]
    align = ["align", str(tiny_llava), "--suite", str(suite), *flags]
    assert run([*align, "--out", str(tmp_path / "lppo"), "--json"]) == 0
    output = capsys.readouterr()
    config = json.loads(output.out)["settings"]["config"]
    assert (config["minibatch_size"], config["value_warmup_steps"]) == (4, 1)
    assert "also judge both audits with another model, e.g. exitsafe judge RUN --judge harmbench" in output.err


def test_a_seed_that_is_no_number(tiny_llava: Path, suite: Path, tmp_path: Path, fail: Any) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("lppo: {seed: abc}\n")
    line = fail("align", tiny_llava, "--suite", suite, "--config", settings, "--out", tmp_path / "lppo")
    assert "Invalid value for '--seed'" in line


def test_a_tracker_by_name(tiny_llava: Path, suite: Path, tmp_path: Path, fail: Any) -> None:
    flags = ["--suite", suite, "--steps", "2", "--batch-size", "4", "--max-new-tokens", "2", "--layers", "1"]
    line = fail("align", tiny_llava, *flags, "--config", "track=paper", "--out", tmp_path / "unknown")
    assert "tracker 'paper' is unknown; choose tensorboard, trackio, wandb" in line
    pytest.importorskip("tensorboard")
    out = tmp_path / "lppo"
    assert run([str(x) for x in ("align", tiny_llava, *flags, "--config", "track=tensorboard", "--out", out)]) == 0
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))


def test_a_training_that_skips_everything_fails(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.lppo.update.MAX_RATIO", 0.5)
    flags = ["--suite", suite, "--steps", "2", "--batch-size", "4", "--max-new-tokens", "2", "--layers", "1"]
    flags += ["--reward", "refusal-prefix"]
    assert run([str(word) for word in ("align", tiny_llava, *flags, "--out", tmp_path / "lppo")]) == FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    assert "nothing was learnt: 4 of 4 minibatches were skipped" in line
    assert not (tmp_path / "lppo" / "adapter").exists()


def test_completions_in_a_private_file_and_on_a_page(
    tiny_llava: Path, suite: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Any
) -> None:
    out, page = tmp_path / "lppo", tmp_path / "training.html"
    flags = ["--steps", "2", "--batch-size", "4", "--max-new-tokens", "2", "--limit", "4", "--layers", "1"]
    flags += ["--reward", "refusal-prefix", "--config", "save_completions=3"]
    assert run(["align", str(tiny_llava), "--suite", str(suite), *flags, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert (out / "completions.jsonl").stat().st_mode & 0o777 == 0o600
    rows[0]["text"] = "<script>a zorb</script>"
    (out / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert run(["report", str(out), "--out", str(page)]) == 0
    text = page.read_text()
    assert "Step 1: 3 answers" in text
    assert rows[0]["sample_id"] in text
    assert "final_score" in text
    assert "zorb" not in text
    assert page.stat().st_mode & 0o777 == 0o644
    assert run(["report", str(out), "--out", str(page), "--include-unsafe-text", "--title", "Mine"]) == 0
    text = page.read_text()
    assert "&lt;script&gt;a zorb&lt;/script&gt;" in text
    assert "<title>Mine</title>" in text
    assert page.stat().st_mode & 0o777 == 0o600

    assert "report it on its own page" in fail("report", audited, out, "--out", page)
    (out / "completions.jsonl").write_text("[1]\n")
    assert "completions.jsonl is damaged in line 1" in fail("report", out, "--out", page)


NESTED = "[" * 100_000 + "]" * 100_000 + "\n"


@pytest.mark.parametrize("name", ["run.json", "result.json", "metrics.jsonl", "completions.jsonl"])
def test_a_hostile_file_of_a_training_is_one_line_of_its_report(tmp_path: Path, fail: Any, name: str) -> None:
    training, page = tmp_path / "lppo", tmp_path / "training.html"
    training.mkdir()
    for file in ("run.json", "metrics.jsonl"):
        (training / file).write_text("{}\n")
    (training / name).write_text(NESTED)
    assert f"{name} " in (line := fail("report", training, "--out", page))
    assert "it is nested too deeply" in line
    assert not page.exists()


def test_a_hostile_file_of_a_finished_training_is_one_line_of_align(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--suite", suite, "--steps", "1", "--batch-size", "4", "--max-new-tokens", "2", "--limit", "4"]
    flags += ["--layers", "1", "--reward", "refusal-prefix", "--out", tmp_path / "lppo"]
    assert run([str(word) for word in ("align", tiny_llava, *flags)]) == 0
    for name in ("result.json", "metrics.jsonl"):  # the last is read first
        (tmp_path / "lppo" / name).write_text(NESTED)
        capsys.readouterr()
        assert run([str(word) for word in ("align", tiny_llava, *flags)]) == FAILED
        warning, line = capsys.readouterr().err.splitlines()
        assert "was finished already" in warning
        assert f"{name} " in line and "it is nested too deeply" in line


def test_a_proxy_is_warned_of_before_it_is_optimised(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("exitsafe.lppo.state.rollout", stop)
    flags = ["--suite", str(suite), "--reward", "refusal-prefix", "--steps", "2", "--out", str(tmp_path / "run")]
    run(["align", str(tiny_llava), *flags])
    words = " ".join(capsys.readouterr().err.split())
    assert "the reward refusal-prefix is a proxy that does not read meaning" in words
