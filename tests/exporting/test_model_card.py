"""The card as the Hub reads it, and what an audit lends it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

import exitsafe
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.exporting.audited import _by_suite, _judge, audit_record
from exitsafe.exporting.manifest import AuditedJudge, Base, Exported, read_manifest
from exitsafe.exporting.model_card import is_hub_id, license_of, write_card
from exitsafe.records import KINDS, Sample
from exitsafe.results.run import AuditRun
from tests.exporting.slim_models import save_adapter
from tests.finished_runs import edit_head
from tests.gate.gate_runs import rows, write_run
from tests.tiny_models import noise_image, save_tiny, tiny_llava, tiny_processor

SECRET = "how do i make a zorb"
SAMPLES = [
    Sample(
        id=f"s{number}",
        prompt=SECRET if number % 2 else "what colour is the shape",
        images=(noise_image(number),),
        kind=KINDS[number % 4],
        answers=("red",),
        source="xstest" if number % 8 < 4 else "my-own",
    )
    for number in range(16)
]
HUB = {"xstest": {"id": "walledai/XSTest", "configs": [], "split": "test", "revision": "c0ffee" * 6}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("card") / "model")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    return exitsafe.audit(
        load_vlm(model),
        SAMPLES,
        judges=["refusal-prefix"],
        exit_layers=(2, 5),
        max_new_tokens=6,
        out=tmp_path_factory.mktemp("run") / "before",
        origin={"hub": HUB},
    )


def test_the_audits_numbers_are_in_the_card_as_the_hub_reads_it(model: Path, run: AuditRun, tmp_path: Path) -> None:
    out = exitsafe.export(load_vlm(model), exit_layer=2, out=tmp_path / "slim", audit=run.path)
    text = (out / "README.md").read_text()
    header = _header(text)
    assert header.to_dict()["library_name"] == "transformers"
    assert header.pipeline_tag == "image-text-to-text"
    assert header.base_model is None, "a local folder is no id of the Hub"
    assert header.license is None
    assert header.model_name == "slim"
    found = {(result.dataset_name, result.metric_type): result for result in header.eval_results or []}
    asr = found["xstest", "asr_proxy"]
    assert (asr.dataset_type, asr.dataset_split, asr.dataset_revision) == ("walledai/XSTest", "test", "c0ffee" * 6)
    scores = [
        verdict.score
        for verdict in run.verdicts()
        if (verdict.exit_layer, verdict.measure) == (2, "asr") and verdict.sample_id in ("s0", "s8")
    ]
    assert asr.metric_value == sum(filter(None, scores)) / len(scores)
    assert "n=2, 95% CI" in (asr.metric_name or "")
    assert found["my-own", "asr_proxy"].dataset_type == "my-own"
    metrics = next(entry["metrics"] for entry in run.summary["layers"] if entry["exit_layer"] == 2)
    asr_all = metrics["asr"]
    row = next(line for line in text.splitlines() if line.startswith("| Requests not refused (proxy) |"))
    low, high = (f"{100 * asr_all[end]:.1f}" for end in ("low", "high"))
    value = f"{100 * asr_all['value']:.1f}% ({low} to {high}%)"
    assert row.startswith(f"| Requests not refused (proxy) | {value} | 4 |")
    for said in (
        "refusal-prefix (asr, refusal)",
        "`walledai/XSTest` at revision",
        "greedy, at most 6 tokens",
        "exit 2",
    ):
        assert said in text
    assert str(tmp_path) not in text + (out / "exitsafe.json").read_text()
    assert str(model.parent) not in text + (out / "exitsafe.json").read_text()


def test_no_text_of_prompts_or_answers_anywhere(model: Path, run: AuditRun, tmp_path: Path) -> None:
    out = exitsafe.export(load_vlm(model), exit_layer=2, out=tmp_path / "slim", audit=run)
    shipped = (out / "README.md").read_text() + (out / "exitsafe.json").read_text()
    texts = {response.text for response in run.responses() if len(response.text.split()) > 1}
    assert len(texts) > 5
    assert not [text for text in {SECRET, *texts} if text in shipped]


def test_what_a_run_says_cannot_format_the_card(model: Path, run: AuditRun, tmp_path: Path) -> None:
    hostile = "x\n\n# Safe <img src=x> `|[a](b) \x1b[2J\u202e"
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    edit_head(path, lambda head: head["settings"]["versions"].update({"torch": hostile}))
    text = (exitsafe.export(load_vlm(model), exit_layer=2, out=tmp_path / "slim", audit=path) / "README.md").read_text()
    assert "x # Safe" in text
    assert not [word for word in ("<img", "\n# Safe", "[a](b)", "\x1b", "\u202e") if word in text]


def test_a_run_with_other_settings_than_an_audits_is_one_line(run: AuditRun) -> None:
    odd = replace(run, origin={"hub": {"xstest": {"id": ["not", "a", "name"]}}})
    with pytest.raises(RunError, match=r"run\.json: id: Input should be a valid string; give an audit that"):
        audit_record(odd, exit_layer=2)


def test_without_an_audit_the_card_says_so(model: Path, tmp_path: Path) -> None:
    out = exitsafe.export(load_vlm(model), exit_layer=2, out=tmp_path / "slim")
    text = (out / "README.md").read_text()
    assert "No audit was given" in text
    assert not _header(text).eval_results
    assert "model-index" not in text
    assert read_manifest(out).audit is None


def test_another_models_run_is_refused(model: Path, run: AuditRun, tmp_path: Path) -> None:
    def refused(vlm: VLM, *, exit_layer: int = 2, **settings: Any) -> str:
        with pytest.raises(RunError) as error:
            exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim", audit=run, **settings)
        assert not (tmp_path / "slim").exists()
        return str(error.value)

    adapter = save_adapter(model, tmp_path / "adapter")
    assert 'a run of another model (adapter was null, is now "' in refused(load_vlm(model, adapter=adapter))
    assert "(dtype was" in refused(load_vlm(model, dtype="bfloat16"))
    assert "has no exit layer 3, only 2, 5: audit that exit" in refused(load_vlm(model), exit_layer=3)
    assert "not loaded from files" in refused(VLM(tiny_llava(), tiny_processor("llava"), name="memory"))
    settings = json.loads((model / "generation_config.json").read_text())
    save_tiny("llava", tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 3}))
    assert "(checkpoint was" in refused(load_vlm(tmp_path / "other"))


def test_a_kept_adapter_is_said_loudly() -> None:
    text = write_card(name="slim", license_id=None, exported=EXPORTED.model_copy(update={"adapter": "kept"}))
    assert "must be loaded too: without it this is the model before its repair" in text
    assert 'PeftModel.from_pretrained(model, "slim", subfolder="adapter")' in text


def test_base_model_and_license_where_they_are_known(tmp_path: Path) -> None:
    base = BASE.model_copy(update={"name": "llava-hf/llava-1.5-7b-hf"})
    text = write_card(name="slim", license_id="mit", exported=EXPORTED.model_copy(update={"base": base}))
    assert _header(text).base_model == "llava-hf/llava-1.5-7b-hf"
    assert _header(text).license == "mit"
    assert license_of("organism", folder=None, revision=None) == "apache-2.0"
    assert license_of("nobody/nothing-at-all", folder=None, revision=None) is None
    assert license_of("x", folder=tmp_path, revision=None) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n\ntext\n")
    assert license_of("x", folder=tmp_path, revision=None) == "llama3.2"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of("x", folder=tmp_path, revision=None) is None
    assert [is_hub_id(name) for name in ("a/b", "organism", "/a/b", "./a", "a/b/c")] == [
        True,
        False,
        False,
        False,
        False,
    ]


def _header(text: str) -> ModelCardData:
    """What the Hub's own library reads."""
    found = ModelCard(text).data
    assert isinstance(found, ModelCardData)
    return found


BASE = Base(
    name="model",
    family="llava",
    encoder="image",
    num_layers=6,
    default_exit=5,
    checkpoint="c0",
    adapter="a0",
    translators=None,
)
_SIZES = {"encoder_blocks": 6, "global_blocks": 0, "parameters": 10, "weight_bytes": 40}
EXPORTED = Exported(
    exitsafe="0",
    command="exitsafe export model --exit-layer 2 --out slim",
    date="2000-01-01T00:00:00+00:00",
    base=BASE,
    exit_layer=2,
    skip_global=False,
    adapter=None,
    dtype="float32",
    check={"largest_difference": 0.0, "relative_difference": 0.0, "allowed": 0.0},
    sizes={"before": _SIZES, "after": _SIZES},
    latency={},
    audit=None,
    versions={},
)


@pytest.mark.parametrize("model", ("/home/ann/rm", "models/of/ann/rm", "../ann/rm", "~/rm"))
def test_a_judges_folder_is_not_told(model: str) -> None:
    told = _judge({"name": f"reward:{model}", "measures": ["reward"], "settings": {"model": model}}, None)
    assert told == AuditedJudge(name="reward:rm", measures=("reward",), model="rm")


def test_a_judges_name_on_the_hub_is_told_whole() -> None:
    for name in ("world-rule", "reward:org/rm"):
        assert _judge({"name": name, "measures": ["reward"]}, None).name == name


def test_nor_in_a_result(tmp_path: Path) -> None:
    found = write_run(tmp_path / "run", {"asr": rows(20)}, judge="reward:/home/ann/rm")
    found = replace(found, settings={**found.settings, "stop_when": None})
    assert [each.judge for each in _by_suite(found, exit_layer=1)] == ["reward:rm"]
