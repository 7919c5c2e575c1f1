"""`--reward` and `--eval-...` as they are written, and one run with both."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from exitsafe.auditing.judging import warn_of_own_reward
from exitsafe.cli.main import INTERRUPTED, run
from exitsafe.cli.rewards import hold_out, read_rewards
from exitsafe.errors import InputError
from exitsafe.lppo import Evaluation, WeightedSum
from exitsafe.lppo.config import AlignSpec, HeldOut
from exitsafe.lppo.rollout import rollout
from exitsafe.records import KINDS, Response, Sample, Verdict
from exitsafe.world import organism_suites
from tests.cli.conftest import Fail, write_suite
from tests.judges.tiny_judges import no_guard, rule_guard, use_judge  # noqa: F401

SETTINGS = """
minibatch_size: 4
value_warmup_steps: 1
lora_rank: 2
reward: [toxicity@harmful=0.5, built-in]
eval_max_kl: 9
"""


def parts_of(*written: str) -> list[tuple[str, tuple[str, ...], float]]:
    found = read_rewards(written)
    assert isinstance(found, WeightedSum)
    return [(part.label.partition("@")[0], part.kinds, part.weight) for part in found.parts]


def test_rewards_as_they_are_written() -> None:
    assert read_rewards(None) is read_rewards([]) is read_rewards(["built-in"]) is None
    alone: Any = read_rewards(["refusal-prefix"])
    assert alone.name == "refusal-prefix"
    assert parts_of("vqa=2", "built-in@harmful,benign") == [
        ("vqa", KINDS, 2.0),
        ("built-in", ("harmful", "benign"), 1.0),
    ]
    assert parts_of("coherence@vqa=-1e-1") == [("coherence", ("vqa",), -0.1)]
    shared: Any = read_rewards(["vqa@vqa=2", "vqa@benign"])
    assert shared.parts[0].reward is shared.parts[1].reward  # one judge, one copy of its weights


def test_a_folder_may_hold_any_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.auditing.judging.judge_settings", lambda judge: {})
    alone: Any = read_rewards(["reward:/models@home/a=1/b"])
    assert alone.name == "reward:/models@home/a=1/b"
    assert parts_of("reward:/a@b/c=d/m@vqa=3") == [("reward:/a", ("vqa",), 3.0)]


def spec_of(model: str, **evaluation: Any) -> AlignSpec:
    return AlignSpec(model=model, out=Path("out"), evaluation=HeldOut(**evaluation))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["vqa=much"], "--reward vqa=much: 'much' is no number"),
        (["vqa=nan"], "'nan' is no number"),
        (["vqa=0"], "reward vqa has the weight 0.0"),
        (["vqa@harmless=1"], "kind 'harmless' is unknown; choose harmful, borderline"),
        (["oracle=1"], "judge 'oracle' is unknown"),
        (["vqa=1", "vqa=2"], "reward vqa is given 2 times"),
    ],
)
def test_rewards_that_make_no_sense(written: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rewards(written)


def test_the_organism_is_evaluated_by_what_it_is_not_trained_on() -> None:
    samples = organism_suites(split="train", sizes=dict.fromkeys(KINDS, 40))
    trained, evaluation = hold_out(spec_of("organism", every=7, num_samples=5), samples, reward=None)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.judge is not None and not isinstance(evaluation.judge, str)
    assert (evaluation.every, evaluation.patience, evaluation.max_kl, evaluation.judge.name) == (
        7,
        5,
        None,
        "refusal-prefix",
    )
    assert len(evaluation.samples) == 4 * 5
    assert len(trained) == 4 * 35
    ids = {sample.id for sample in trained} | {sample.id for sample in evaluation.samples}
    assert ids == {sample.id for sample in samples}
    _, patient = hold_out(spec_of("organism", every=7, patience=0), samples, reward=None)
    assert isinstance(patient, Evaluation)
    assert patient.patience is None


@pytest.mark.usefixtures("rule_guard")
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([], "harmbench"),
        (["refusal-prefix"], "qwen3guard"),
        (["toxicity"], "harmbench"),  # the guard helps it out on refusals
        (["reward:hh"], "qwen3guard"),
        (["reward:hh@harmful", "built-in@benign"], "harmbench"),
        (["qwen3guard"], "harmbench"),
    ],
)
def test_the_evaluation_is_by_another_judge_than_the_reward(
    rewards: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitsafe.auditing.judging.judge_settings", lambda judge: {})
    samples = [
        Sample(id=f"{kind}-{number}", prompt="what", kind=kind, source="mine")
        for kind in ("harmful", "benign")
        for number in range(4)
    ]
    _, evaluation = hold_out(spec_of("a/model", every=2, num_samples=1), samples, reward=read_rewards(rewards))
    assert isinstance(evaluation, Evaluation) and evaluation.judge is not None and not isinstance(evaluation.judge, str)
    assert evaluation.judge.name == expected


@pytest.mark.usefixtures("no_guard")
def test_without_the_guard_model_no_proxy_takes_its_place(
    tiny_llava: Path, suite: Path, tmp_path: Path, fail: Fail
) -> None:
    line = fail("align", tiny_llava, "--suite", suite, "--steps", "2", "--out", tmp_path / "run")
    assert "the reward needs the judge qwen3guard, which is not available" in line
    assert "choose another with --reward NAME" in line
    assert not (tmp_path / "run").exists()


def test_a_suite_of_its_own_leaves_the_training_alone(suite: Path, samples: list[Sample]) -> None:
    spec = spec_of("organism", every=3, judge="refusal-prefix", suites=(str(suite),), num_samples=6, max_kl=2.0)
    trained, evaluation = hold_out(spec, samples, reward=None)
    assert trained == samples
    assert isinstance(evaluation, Evaluation)
    assert len(evaluation.samples) == 6
    assert evaluation.max_kl == 2.0


def test_without_a_number_of_steps_there_is_no_evaluation(samples: list[Sample]) -> None:
    assert hold_out(spec_of("organism"), samples, reward=None) == (samples, "auto")
    assert hold_out(spec_of("organism", every=0, max_kl=1.0), samples, reward=None) == (samples, None)
    with pytest.raises(ValueError, match="need --eval-every N"):
        spec_of("organism", max_kl=1.0)


@pytest.fixture
def samples() -> list[Sample]:
    return organism_suites(split="train", sizes=dict.fromkeys(KINDS, 4))


class Stub:
    """Stands for a judge that needs a model; scores by length."""

    def __init__(self, name: str, *measures: str) -> None:
        self.name, self.measures = name, measures

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure=measure,
                score=len(response.text) / 99,
            )
            for sample, response in zip(samples, responses, strict=True)
            for measure in self.measures
            if sample.kind == "harmful" or measure == "refusal"
        ]


def test_a_run_with_two_rewards_and_an_evaluation_interrupted(
    tiny_llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_judge(monkeypatch, "toxicity", Stub("toxicity", "toxicity"))
    use_judge(monkeypatch, "qwen3guard", Stub("qwen3guard", "asr", "refusal"))
    use_judge(monkeypatch, "harmbench", Stub("harmbench", "asr"))
    suite = write_suite(tmp_path / "suite", num_samples=16)
    (tmp_path / "lppo.yaml").write_text(SETTINGS)
    out = tmp_path / "lppo"
    flags = ["--steps", "3", "--batch-size", "4", "--max-new-tokens", "2", "--layers", "1"]
    evaluation = ["--eval-every", "2"]
    align = ["align", str(tiny_llava), "--suite", str(suite), "--config", str(tmp_path / "lppo.yaml"), *flags]
    align += ["--out", str(out)]
    assert run([*align, *evaluation, "--eval-judge", "qwen3guard"]) == 2
    assert "judge qwen3guard is also the reward" in capsys.readouterr().err
    assert not out.exists()

    def stopped(*args: Any, draw: int, **settings: Any) -> Any:
        if draw == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rollout(*args, draw=draw, **settings)

    with monkeypatch.context() as patched:
        patched.setattr("exitsafe.lppo.state.rollout", stopped)
        assert run([*align, *evaluation]) == INTERRUPTED
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1] == "exitsafe: interrupted; rerun the same command to resume from step 2 of 3"
    assert run([*align, *evaluation, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    settings = document["settings"]
    assert settings["reward"].split("+")[0] == "toxicity"
    assert settings["reward_parts"] == {"toxicity@harmful": 0.5, "built-in": 1.0}
    assert (settings["evaluation"]["judge"]["name"], settings["evaluation"]["max_kl"]) == ("harmbench", 9.0)
    assert settings["evaluation"]["data"]["samples"] == 4
    assert settings["data"]["samples"] == 8  # every sample has a twin under another name
    assert document["result"]["steps"] == document["last_step"]["step"] + 1 == 3
    assert set(document["last_step"]["reward_parts"]) == {"toxicity@harmful", "built-in"}
    looks = [json.loads(line)["step"] for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert looks == [0, 2, 3]
    for judge in ("toxicity", "qwen3guard"):  # any part of the sum, and what helps it out
        with pytest.warns(UserWarning, match=f"judge {judge} was the reward"):
            warn_of_own_reward(out / "adapter", [Stub(judge, "asr")])
    warn_of_own_reward(out / "adapter", [Stub("harmbench", "asr")])
    assert capsys.readouterr().err == ""
    assert run([*align, *evaluation]) == 0
    assert (
        f"The adapter is from step {document['result']['adapter_step']} of 3: the lowest objective"
        in capsys.readouterr().out
    )
