"""Held-out evaluation: its curve, its choice, its end; it moves no training, and an interrupt moves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import exitsafe
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, RunError
from exitsafe.judges import load_judges
from exitsafe.judges.local_model import is_downloaded
from exitsafe.lppo import Evaluation, LPPOConfig, Part, WeightedSum, align, keep_apart
from exitsafe.lppo.checkpoint import load_checkpoint, save_checkpoint
from exitsafe.lppo.evaluation import default_evaluation, objective
from exitsafe.lppo.metrics import NEVER_TWICE
from exitsafe.lppo.scorer import as_scorer
from exitsafe.records import Response, Sample, Verdict
from exitsafe.world import organism_suites
from tests.judges.tiny_judges import rule_guard  # noqa: F401
from tests.lppo.conftest import count_red, make_samples, make_vlm, tiny_config
from tests.lppo.test_trainer import adapter_of, assert_same_run, interrupt, metrics_of


class Scripted:
    """Attack success by the number of the evaluation; it draws random numbers, as a judge may."""

    name = "scripted"
    measures: tuple[str, ...] = ("asr", "refusal")

    def __init__(self, *rates: float | None, event: Callable[[], None] = lambda: None, at: int = -1) -> None:
        self.rates, self.event, self.at, self.results = rates, event, at, 0

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        torch.rand(1)
        if self.results == self.at:
            self.event()
        rate = self.rates[self.results]
        self.results += 1
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure=measure,
                score=score,
                unscored="unreadable" if score is None else None,
            )
            for response in responses
            for measure, score in (("asr", rate), ("refusal", 0.0))
        ]


@pytest.fixture
def split(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    return keep_apart(samples, per_kind=1)


def evaluations_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NEVER_TWICE} for line in lines]


def result_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluation that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    trained, _ = keep_apart(make_samples(), per_kind=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitsafe.lppo.trainer.save_checkpoint", partial(save_checkpoint, keep=99))
        align(make_vlm("llava"), trained, reward=count_red, config=tiny_config(checkpoint_every=1), out=folder)
    return folder


def weights_after(step: int, checkpoints: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names of the adapter's file."""
    for path in checkpoints.iterdir():
        if path.name > f"step-{step:06d}.ckpt":
            path.unlink()
    found = load_checkpoint(checkpoints, torch.device("cpu"))
    assert found is not None
    assert found[0] == step
    return {name.replace(".default", ""): weight for name, weight in found[1]["weights"].items()}


def test_the_objective_by_hand() -> None:
    untrained: dict[int, dict[str, float | None]] = {
        1: {"asr": 1.0, "benign_refusal": 0.0, "vqa_accuracy": 0.9, "coherence": 1.0}
    }
    untrained[2] = untrained[1] | {"vqa_accuracy": 0.5}
    now: dict[int, dict[str, float | None]] = {
        1: {"asr": 0.25, "benign_refusal": 0.0, "vqa_accuracy": 0.7, "coherence": 1.0},
        2: {"asr": 0.0, "benign_refusal": 0.125, "vqa_accuracy": 0.6, "coherence": 0.9},
    }
    # the worst exit of each: .25 + .125 + (.9 - .7) + (1 - .9); what exit 2 gained in VQA buys nothing
    assert objective(now, untrained) == 0.675
    assert objective(untrained, untrained) == 1.0
    assert objective({1: {"asr": 0.5, "vqa_accuracy": 0.9}}, {1: {"asr": 1.0, "vqa_accuracy": 0.5}}) == 0.5
    refusing = {layer: rates | {"asr": 0.0, "benign_refusal": 1.0} for layer, rates in untrained.items()}
    assert objective(refusing, untrained) == 1.0  # refusing everything is no better than refusing nothing
    assert objective({1: now[1] | {"asr": None}, 2: now[2]}, untrained) is None


def test_an_evaluation_sees_what_an_audit_sees(tmp_path: Path) -> None:
    vlm = exitsafe.load_vlm("organism")
    sizes: Any = {"harmful": 16, "borderline": 16, "benign": 16, "vqa": 16}
    trained, held_out = keep_apart(organism_suites(split="train", sizes=sizes), per_kind=4)
    config = LPPOConfig.for_organism(
        num_steps=1, batch_size=16, minibatch_size=16, value_warmup_steps=0, learning_rate=1e-9
    )
    evaluation = Evaluation(samples=held_out, judge="refusal-prefix", every=1)
    with pytest.warns(RuntimeWarning, match="no evaluation beat"):  # the learning rate is next to none
        align(vlm, trained, config=config, evaluation=evaluation, out=tmp_path / "run")
    run = exitsafe.audit(vlm, held_out, judges=["refusal-prefix"], max_new_tokens=24, out=tmp_path / "audit")
    before, after = evaluations_of(tmp_path / "run")
    assert (before["step"], before["kl"], after["step"]) == (0, 0.0, 1)
    for entry in run.summary["layers"]:
        metrics = {name: metric["value"] for name, metric in entry["metrics"].items()}
        rates = before["exits"][str(entry["exit_layer"])]
        assert rates == {name: metrics[name] for name in rates}
        assert set(rates) == {"asr", "over_refusal", "benign_refusal", "vqa_accuracy", "coherence"}
    assert before["exits"]["2"]["asr"] == 1.0
    assert before["exits"]["7"]["asr"] == 0.0
    assert before["objective"] == pytest.approx(1.0, abs=0.3)


def test_a_reward_that_pays_for_refusals_is_found_out(tmp_path: Path) -> None:
    def refuses(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return [float(response.text.startswith("i cannot")) for response in responses]

    sizes: Any = {"harmful": 64, "borderline": 64, "benign": 32, "vqa": 32}
    trained, held_out = keep_apart(organism_suites(split="train", sizes=sizes), per_kind=8)
    config = LPPOConfig.for_organism(
        num_steps=20, batch_size=48, minibatch_size=24, value_warmup_steps=1, exit_layers=(2,), learning_rate=5e-4
    )
    evaluation = Evaluation(samples=held_out, judge="world-rule", every=4, patience=2)
    with pytest.warns(RuntimeWarning, match="no evaluation beat the untrained model"):
        align(
            exitsafe.load_vlm("organism"),
            trained,
            reward=refuses,
            config=config,
            evaluation=evaluation,
            out=tmp_path / "run",
        )
    rewards = [line["reward"] for line in metrics_of(tmp_path / "run")]
    assert rewards[-1] > rewards[0] + 0.3  # the reward is well pleased
    before, *_, last = evaluations_of(tmp_path / "run")
    assert before["exits"]["2"]["asr"] == 1.0
    assert last["exits"]["2"]["asr"] <= 0.25
    assert last["exits"]["7"]["over_refusal"] >= 0.75
    assert last["objective"] > before["objective"]
    result = result_of(tmp_path / "run")
    assert (result["adapter_step"], result["steps"], result["stopped_early"]) == (0, 8, True)


def test_an_evaluation_moves_no_training_and_leaves_numbers_only(
    vlm: VLM, samples: list[Sample], split: tuple[list[Sample], list[Sample]], tmp_path: Path
) -> None:
    def draws(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        return torch.rand(len(responses)).tolist()

    trained, held_out = split
    align(vlm, trained, reward=draws, config=tiny_config(), out=tmp_path / "alone")
    evaluation = Evaluation(samples=held_out, judge=Scripted(0.5, 0.5, 0.4), every=2)
    align(vlm, trained, reward=draws, config=tiny_config(), evaluation=evaluation, out=tmp_path / "evaluated")
    assert_same_run(tmp_path / "alone", tmp_path / "evaluated")
    results = evaluations_of(tmp_path / "evaluated")
    assert [result["step"] for result in results] == [0, 2, 4]
    assert [result["kl"] for result in results[1:]] == [metrics_of(tmp_path / "alone")[step]["kl"] for step in (1, 3)]

    def check(value: Any) -> None:
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(entry)
        assert isinstance(value, dict | list | int | float) or value is None

    check(results)
    assert list(results[0]["exits"]) == ["1", "2", "3", "4", "5", "6"]
    result = result_of(tmp_path / "alone")
    assert result | {"steps": 4, "adapter_step": 4, "why": "the last step", "learnt": True} == result


def test_the_best_step_becomes_the_adapter(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], alone: Path, tmp_path: Path
) -> None:
    trained, held_out = split
    judge = Scripted(0.9, 0.6, 0.2, 0.2)
    align(vlm, trained, reward=count_red, config=tiny_config(), out=tmp_path / "run",
          evaluation=Evaluation(samples=held_out, judge=judge, every=1))  # fmt: skip
    assert [result["best_step"] for result in evaluations_of(tmp_path / "run")] == [0, 2, 3, 3]  # the earlier of equals
    result = result_of(tmp_path / "run")
    assert (result["adapter_step"], result["steps"], result["stopped_early"]) == (3, 4, False)
    assert result["why"].endswith("of 4 evaluations")
    checkpoints = Path(shutil.copytree(alone / "checkpoints", tmp_path / "checkpoints"))
    right, found = weights_after(3, checkpoints), adapter_of(tmp_path / "run")
    assert right.keys() == found.keys()
    assert all(torch.equal(right[name], found[name]) for name in right)
    assert not all(torch.equal(adapter_of(alone)[name], found[name]) for name in found)


def test_it_ends_when_the_curve_falls_no_more(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], tmp_path: Path
) -> None:
    trained, held_out = split
    evaluation = Evaluation(samples=held_out, judge=Scripted(0.9, 0.1, 0.3, None), every=1, patience=2)
    # the first step trains the value head alone: nothing to evaluate
    align(vlm, trained, reward=count_red, config=tiny_config(num_steps=5), evaluation=evaluation, out=tmp_path / "run")
    assert [result["step"] for result in evaluations_of(tmp_path / "run")] == [0, 2, 3, 4]
    assert evaluations_of(tmp_path / "run")[-1]["objective"] is None
    assert len(metrics_of(tmp_path / "run")) == 4
    result = result_of(tmp_path / "run")
    assert (result["adapter_step"], result["steps"], result["stopped_early"]) == (2, 4, True)


def test_only_steps_within_the_budget_may_win(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], alone: Path, tmp_path: Path
) -> None:
    trained, held_out = split
    kl = [line["kl"] for line in metrics_of(alone)]
    rates = (0.9, 0.8, 0.5, 0.1)  # after steps 0, 2, 3, 4
    assert kl[3] > max(0.0, kl[1], kl[2])
    evaluation = Evaluation(
        samples=held_out, judge=Scripted(*rates), every=1, max_kl=(kl[3] + max(0.0, kl[1], kl[2])) / 2
    )
    align(vlm, trained, reward=count_red, config=tiny_config(), evaluation=evaluation, out=tmp_path / "run")
    assert [result["within_budget"] for result in evaluations_of(tmp_path / "run")] == [True, True, True, False]
    assert result_of(tmp_path / "run")["adapter_step"] == 3
    assert "with a KL of at most" in result_of(tmp_path / "run")["why"]


def test_it_says_when_nothing_was_better_or_nothing_could_be_scored(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], tmp_path: Path
) -> None:
    trained, held_out = split
    config = tiny_config(num_steps=2)
    for name, rates, message, step in (
        ("worse", (0.5, 0.6), "no evaluation beat the untrained model", 0),
        ("silent", (None, None), "none of 2 evaluations could be scored", 2),
    ):
        evaluation = Evaluation(samples=held_out, judge=Scripted(*rates), every=2)
        with pytest.warns(RuntimeWarning, match=message):
            align(vlm, trained, reward=count_red, config=config, evaluation=evaluation, out=tmp_path / name)
        assert result_of(tmp_path / name)["adapter_step"] == step
    changes = [weight.abs().max().item() for name, weight in adapter_of(tmp_path / "worse").items() if "lora_B" in name]
    assert changes
    assert max(changes) == 0.0


RATES = (0.9, 0.3, 0.4, 0.5, 0.1)


def evaluated(vlm: VLM, trained: Sequence[Sample], held_out: Sequence[Sample], judge: Scripted, out: Path) -> Path:
    evaluation = Evaluation(samples=held_out, judge=judge, every=1, patience=2)
    align(vlm, trained, reward=count_red, config=tiny_config(checkpoint_every=99), evaluation=evaluation, out=out)
    return out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    split = keep_apart(make_samples(), per_kind=1)
    return evaluated(make_vlm("llava"), *split, Scripted(*RATES), tmp_path_factory.mktemp("evaluated") / "run")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_evaluation_is_repeated_and_the_run_ends_the_same(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], uninterrupted: Path, tmp_path: Path, at: int
) -> None:
    trained, held_out = split
    cut = tmp_path / "cut"
    assert result_of(uninterrupted)["adapter_step"] == 2
    with pytest.raises(KeyboardInterrupt):
        evaluated(vlm, *split, Scripted(*RATES, event=interrupt, at=at), cut)
    assert len(metrics_of(cut)) == at + 1 if at else not (cut / "metrics.jsonl").read_bytes()
    evaluated(vlm, *split, Scripted(*RATES[at:]), cut)
    assert_same_run(uninterrupted, cut)
    assert evaluations_of(cut) == evaluations_of(uninterrupted)
    assert result_of(cut) == result_of(uninterrupted)
    with pytest.raises(RunError, match=r"evaluation\.every was 1, is now 3"):
        align(vlm, trained, reward=count_red, config=tiny_config(checkpoint_every=99), out=cut,
              evaluation=Evaluation(samples=held_out, judge=Scripted(), every=3, patience=2))  # fmt: skip


class Model(Scripted):
    """The same weights under any name."""

    def __init__(self, name: str) -> None:
        super().__init__(0.5)
        self.name = name

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": "guard", "revision": "abc"}

    def unload(self) -> None:
        pass


@pytest.mark.usefixtures("rule_guard")
def test_an_evaluation_by_the_reward_is_refused(
    vlm: VLM, split: tuple[list[Sample], list[Sample]], tmp_path: Path
) -> None:
    trained, held_out = split

    def train(reward: Any, judge: Any) -> None:
        evaluation = Evaluation(samples=held_out, judge=judge)
        align(vlm, trained, reward=reward, config=tiny_config(), evaluation=evaluation, out=tmp_path / "run")

    for reward, judge in (
        (None, "qwen3guard"),
        (Model("guard"), Model("guard")),
        (Model("guard"), Model("guard:large")),
        (WeightedSum(parts=(Part(reward=count_red), Part(reward=Model("guard"), kinds=("harmful",)))), Model("guard")),
    ):
        with pytest.raises(InputError, match="is also the reward"):
            train(reward, judge)
    with pytest.raises(InputError, match="judge coherence measures coherence: held-out evaluation needs one of asr"):
        train(count_red, "coherence")
    assert not (tmp_path / "run").exists()


def test_what_is_trained_on_is_not_held_out(
    vlm: VLM, samples: list[Sample], split: tuple[list[Sample], list[Sample]], tmp_path: Path
) -> None:
    _, held_out = split
    with pytest.raises(InputError, match="3 held-out samples are also training samples, such as s0"):
        evaluation = Evaluation(samples=held_out, judge="refusal-prefix")
        align(vlm, samples, reward=count_red, config=tiny_config(), evaluation=evaluation, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_kept_apart_evenly_and_twins_go_too(samples: list[Sample]) -> None:
    many = [Sample(id=f"{kind}{n}", prompt=f"what {n}", kind=kind) for n in range(10) for kind in ("harmful", "benign")]
    trained, held_out = keep_apart(many, per_kind=2)
    assert [sample.id for sample in held_out] == ["harmful0", "harmful5", "benign0", "benign5"]
    assert len(trained) == 16
    trained, held_out = keep_apart(many, per_kind=99)
    assert len(held_out) == 2 * 2  # a quarter at most, rounded down
    twin = Sample(id="twin", prompt="what 5", kind="harmful")
    trained, held_out = keep_apart([*many, twin], per_kind=2)
    assert "twin" not in {sample.id for sample in trained}


def test_the_default_evaluation_needs_a_guard_that_is_not_the_reward_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [Sample(id=f"{kind}{n}", prompt=f"what {n}", kind=kind) for n in range(10) for kind in ("harmful", "benign")]
    (guard,) = load_judges(["qwen3guard"])
    by_guard, by_callable, none = (
        as_scorer(guard, many),
        as_scorer(count_red, many),
        as_scorer(None, many, method="sft"),
    )
    assert default_evaluation(by_callable, many, num_steps=400) == (many, None)  # nothing is downloaded
    monkeypatch.setattr("exitsafe.lppo.evaluation.is_downloaded", lambda model: True)
    for scorer, judge in ((by_guard, "harmbench"), (by_callable, "qwen3guard"), (none, "qwen3guard")):
        training, evaluation = default_evaluation(scorer, many, num_steps=400)
        assert evaluation is not None and evaluation.judge is not None and not isinstance(evaluation.judge, str)
        assert (evaluation.judge.name, evaluation.every, evaluation.patience) == (judge, 20, 5)
        assert (len(training), len(evaluation.samples)) == (16, 4)
    assert default_evaluation(by_callable, many, num_steps=19) == (many, None)
    harmful = [sample for sample in many if sample.kind == "harmful"]
    assert default_evaluation(by_callable, harmful, num_steps=400) == (harmful, None)
    world = organism_suites(split="train")
    assert default_evaluation(by_callable, world, num_steps=400) == (world, None)  # its other judge is a proxy


def test_a_model_is_downloaded_when_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--a--guard" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--guard" / "refs").mkdir()
    (tmp_path / "models--a--guard" / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")  # which looking the model up leaves there
    assert not is_downloaded("a/guard")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert is_downloaded("a/guard")
    assert is_downloaded(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every=0 must be a whole number of at least 1"),
        ({"patience": 0}, "patience=0 must be"),
        ({"max_kl": 0.0}, "max_kl=0.0 must be a number above 0"),
        ({"max_kl": float("nan")}, "max_kl=nan must be a number above 0"),
        ({"samples": []}, "the evaluation's samples are none: give harmful ones"),
        ({"samples": [Sample(id="a", prompt="p", kind="harmful")]}, "refusing everything would look best"),
        (
            {"samples": [Sample(id="a", prompt="p", kind="benign")]},
            "the evaluation's samples are benign: give harmful ones",
        ),
    ],
)
def test_evaluations_that_make_no_sense(samples: list[Sample], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Evaluation(**{"samples": samples, "judge": "refusal-prefix"} | changes)
