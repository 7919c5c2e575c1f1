from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exitsafe.auditing.judging import warn_of_own_reward
from exitsafe.auditing.plan import plan_audit
from exitsafe.cli.main import FAILED, run
from exitsafe.errors import InputError
from exitsafe.results.run import load_run
from exitsafe.specs.inputs import Samples
from exitsafe.specs.verbs import AuditSpec
from exitsafe.world.profile import profile_of
from tests.cli.conftest import Fail
from tests.finished_runs import edit_head
from tests.tiny_models import noise_image

OUT = Path("out")


def spec_of(model: str, **given: Any) -> AuditSpec:
    return AuditSpec(model=model, out=OUT, **given)


def test_an_organism_brings_its_suites() -> None:
    plan = plan_audit(spec_of("organism:text", seed=4))
    kept = {name: value for name, value in plan.origin.items() if name not in ("loading", "model")}
    assert kept == {
        "suites": ["organism-harmful", "organism-borderline", "organism-benign", "organism-vqa"],
        "split": "heldout",
        "seed": 4,
        "limit": None,
        "organism": "organism:text",
        "images": None,
        "categories": None,
        "hub": {},
        "judging": {},
        "judge_pass": "beside",
    }
    assert plan.spec == spec_of("organism:text", seed=4)


def test_another_model_brings_none() -> None:
    with pytest.raises(InputError, match="--suite NAME_OR_FILE or --like RUN"):
        plan_audit(spec_of("some/model"))
    assert plan_audit(spec_of("some/model", samples=Samples(suites=("a.jsonl",)))).spec.max_new_tokens is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"organism": "organism:text"}', "organism:text"), ('{"organism": "dog"}', None), ("[]", None), ("{", None)],
)
def test_a_trained_organism_is_known_by_its_record(tmp_path: Path, content: str, expected: str | None) -> None:
    (tmp_path / "check.json").write_text(content)
    assert getattr(profile_of(str(tmp_path)), "name", None) == expected
    assert profile_of(str(tmp_path / "elsewhere")) is None


def test_like_takes_everything_from_the_other_run(audited: Path, suite: Path) -> None:
    plan = plan_audit(spec_of("m", like=audited))
    assert plan.source.suites == (str(suite),)
    assert plan.spec.judges == ()  # refusal-prefix replaced the default judge there, which is tried again
    wanted = spec_of("m", like=audited, exit_layers="1,2,5", max_new_tokens=8, seed=3)
    assert plan.spec == wanted.model_copy(update={"samples": Samples(suites=(str(suite),))})


def test_flags_win_over_like(audited: Path) -> None:
    samples = Samples(suites=("organism-vqa",), limit=2)
    plan = plan_audit(spec_of("m", like=audited, samples=samples, exit_layers="4", judges=("coherence",), seed=9))
    assert (plan.source.suites, plan.source.seed, plan.source.limit) == (("organism-vqa",), 9, 2)
    assert (plan.spec.exit_layers, plan.spec.judges, plan.spec.max_new_tokens) == ("4", ("coherence",), 8)


def test_like_a_run_of_the_python_api_needs_suites(audited: Path, tmp_path: Path) -> None:
    for file in audited.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_head(tmp_path, lambda head: head.update(origin={}))
    with pytest.raises(InputError, match="does not record the suites"):
        plan_audit(spec_of("m", like=tmp_path))
    given = spec_of("m", like=tmp_path, samples=Samples(suites=("organism-vqa",)))
    assert plan_audit(given).spec.exit_layers == "1,2,5"


def test_answers_longer_than_the_model_has_room_for(fail: Fail, tiny_llava: Path, suite: Path, tmp_path: Path) -> None:
    flags = ["--suite", suite, "--max-new-tokens", "9999999", "--out", tmp_path / "run"]
    line = fail("audit", tiny_llava, "--judge", "refusal-prefix", *flags)
    assert line.startswith("max_new_tokens=9999999, but this model has room for ")
    assert line.endswith("choose fewer")
    assert not (tmp_path / "run").exists()


def test_the_run_and_its_table(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", str(tiny_llava), "--suite", str(suite), "--limit", "5", "--layers", "default"]
    assert run([*arguments, "--max-new-tokens", "12", "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr()
    audit = load_run(tmp_path / "run")
    assert audit.exit_layers == (5,)
    assert audit.origin["suites"] == [str(suite)]
    assert len(audit.samples()) == 5
    assert "5 (default)" in output.out
    assert "Requests not refused" in " ".join(output.out.split())
    assert "proxy" in output.err
    assert "Audit: 5/5" in output.err
    texts = [response.text for response in audit.responses() if len(response.text) > 20]
    assert texts
    assert not any(text in output.out + output.err for text in texts)


def test_again_is_done_at_once_and_json_is_the_summary(
    audited: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (audited / "summary.json").read_bytes()
    arguments = ["audit", str(tiny_llava), "--like", str(audited), "--json", "--out", str(audited)]
    assert run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"run": str(audited), **json.loads(before)}
    assert (audited / "summary.json").read_bytes() == before


def test_a_settings_file_stands_for_flags(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "audit.yaml"
    config.write_text(
        f"model: {tiny_llava}\nsuite: {suite}\nlayers: [2, 4-5]\nmax_new_tokens: 4\nlimit: 8\n"
        f"judge: refusal-prefix\nout: {tmp_path / 'run'}\n"
    )
    assert run(["audit", "--config", str(config), "--limit", "3", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    audit = load_run(tmp_path / "run")
    assert audit.exit_layers == (2, 4, 5)
    assert len(audit.samples()) == 3


@pytest.fixture
def bad_suite(tmp_path: Path) -> Any:
    def write(**changes: Any) -> Path:
        noise_image(0).save(tmp_path / "good.png")
        (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
        row = {"id": "a", "prompt": "what colour is the shape", "kind": "benign", "images": ["good.png"]} | changes
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ["torn.png"]}, "torn.png cannot be read"),
        ({"images": ["none.png"]}, "none.png does not exist"),
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"kind": "odd"}, "kind 'odd' is unknown"),
    ],
)
def test_bad_samples(bad_suite: Any, tmp_path: Path, fail: Any, changes: dict[str, Any], reason: str) -> None:
    out = tmp_path / "run"
    assert reason in fail("audit", "no/model", "--suite", bad_suite(**changes), "--out", out)
    assert not out.exists()


def test_an_empty_suite(tmp_path: Path, fail: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "contains no samples" in fail("audit", "m", "--suite", tmp_path / "empty.jsonl", "--out", tmp_path / "run")


def test_bad_settings(tiny_llava: Path, suite: Path, audited: Path, tmp_path: Path, fail: Any) -> None:
    out = tmp_path / "run"
    audit = ["audit", tiny_llava, "--suite", suite, "--out", out]
    assert "has no suites of its own" in fail("audit", tiny_llava, "--out", out)
    assert "organsim (did you mean organism?) has no suites" in fail("audit", "organsim", "--out", out)
    assert "choose 1 to 6" in fail(*audit, "--layers", "7")
    assert "not a layer or a range" in fail(*audit, "--layers", "two")
    assert "judge 'oracle' is unknown" in fail(*audit, "--judge", "oracle")
    assert "suite 'nowhere' is unknown" in fail("audit", tiny_llava, "--suite", "nowhere", "--out", out)

    def key(setting: str) -> str:
        return str(fail(*audit, "--config", setting))

    assert "split=best must be train or heldout" in key("split=best")
    assert "judge_pass=third must be beside or second" in key("judge_pass=third")
    assert "stop_when=bored must be decided" in key("stop_when=bored")
    assert "needs the limit to decide about" in key("stop_when=decided")
    assert "belong to stop_when" in key("max_asr=0.1")
    assert "max_asr=5 must be a number above 0 and below 1" in key("max_asr=5")
    assert "is a folder and has no revisions" in key("revision=v1")
    assert "judge reward needs a model" in fail(*audit, "--judge", "reward")
    assert "neither a local folder nor in the Hub cache" in fail(*audit, "--judge", "llama-guard")
    assert "has no global blocks" in key("skip_global=true")
    assert "--dtype float1 must be auto or float32" in fail(*audit, "--dtype", "float1")
    assert "has no config.json" in fail("audit", suite.parent, "--suite", suite, "--out", out)
    assert "has no adapter_config.json" in fail(*audit, "--adapter", suite.parent)
    assert "is not a run directory" in fail("audit", tiny_llava, "--like", suite.parent, "--out", out)
    assert "is not empty and not a run" in fail("audit", tiny_llava, "--suite", suite, "--out", suite.parent)
    changed = fail("audit", tiny_llava, "--like", audited, "--seed", "8", "--out", audited)
    assert "decoding.seed was 3, is now 8" in changed
    assert not out.exists()


class _Guard:
    name = "guard"
    measures = ("asr",)
    settings = {"model": "made/up"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        ({"reward": "guard+vqa"}, True),
        ({"reward": "other", "reward_models": {"other": {"model": "made/up"}}}, True),
        ({"reward": "other", "reward_models": {"other": {"model": "another"}}}, False),
        ({"lr": 1}, False),
    ],
)
def test_a_judge_that_was_the_reward_is_warned_of(tmp_path: Path, settings: dict[str, Any], is_warned: bool) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_own_reward(tmp_path / "adapter", [_Guard()])  # type: ignore[list-item]
    assert ["judge guard was the reward" in str(each.message) for each in found] == [True] * is_warned


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize(
    ("weight", "what"),
    [("multi_modal_projector.linear_2.bias", "image features"), ("language_model.lm_head.weight", "logits")],
)
def test_numbers_that_are_not_finite_stop_the_audit(
    weight: str, what: str, temperature: str, tiny_llava: Path, suite: Path, tmp_path: Path, capsys: Any
) -> None:
    """As half precision overflows; it used to end with empty answers, attack success 100% and status 0."""
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[weight].view(-1)[3] = torch.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    audit = ["audit", str(model), "--suite", str(suite), "--layers", "2,5", "--judge", "refusal-prefix"]
    flags = ["--max-new-tokens", "4", "--temperature", temperature, "--dtype", "float16", "--batch-size", "4"]
    assert run([*audit, *flags, "--out", str(tmp_path / "run")]) == FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"exitsafe: sample \S+ at exit [25]: {what} are NaN or infinite in float16", line)
    assert "(--dtype bfloat16 or float32) and a new folder" in line
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_printed_run_says_what_was_audited_and_found(audited: Path) -> None:
    first, what, *rates = str(load_run(audited)).splitlines()
    assert first == f"AuditRun {audited}"
    assert what.endswith(": 8 samples at exits 1, 2, 5, judged by refusal-prefix, vqa, coherence")
    assert rates[0] == "  Requests not refused (proxy): 100.0% at every exit"
    assert [line.split(":")[0].strip() for line in rates[1:]] == ["Over-refusal (proxy)", "VQA accuracy"]
