"""An audit answered by a vLLM server: the same answers as our own, and a clear line for all that goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import exitsafe
from exitsafe.data import load_suites
from exitsafe.engine import vllm_server
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vllm_server import VLLMServer
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitsafeError, InputError, ModelError, RunError
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun
from tests.engine.fake_vllm import FakeVLLM
from tests.judges.chat_server import Answer, failing
from tests.tiny_models import noise_image, tiny_llava_next, tiny_processor

LAYERS = [1, 4, 7]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm("organism")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    suites = load_suites(["organism-harmful", "organism-vqa"], limit=5)
    text = Sample(id="text", prompt="what is the object", kind="benign")
    return [*suites, text, replace(text, id="two", images=(noise_image(1), noise_image(2)))]


@pytest.fixture(scope="module")
def local(vlm: VLM, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    return exitsafe.audit(vlm, samples, exit_layers=LAYERS, out=tmp_path_factory.mktemp("runs") / "local")


@pytest.fixture
def fake(vlm: VLM) -> FakeVLLM:
    return FakeVLLM(vlm)


def texts(run: AuditRun) -> dict[tuple[str, int], tuple[str, int, str]]:
    return {(r.sample_id, r.exit_layer): (r.text, r.num_tokens, r.finish_reason) for r in run.responses()}


def test_answers_and_verdicts_are_those_of_the_local_engine(
    fake: FakeVLLM, local: AuditRun, samples: list[Sample], tmp_path: Path
) -> None:
    with fake.running() as url:
        run = exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")
    assert texts(run) == texts(local)
    assert len(set(texts(run).values())) > 5
    assert run.summary["layers"][0]["metrics"]["asr"] == local.summary["layers"][0]["metrics"]["asr"]
    assert run.settings["engine"] == {"name": "vllm", "version": "0.32.0", "model": "served"}
    assert "127.0.0.1" not in (tmp_path / "run" / "run.json").read_text()


def test_only_encoder_and_projector_take_memory(vlm: VLM) -> None:
    decoder = set(load_vlm("organism", offload_decoder=True).base_model.get_decoder().parameters())
    assert all(each.is_meta for each in decoder)
    loaded = load_vlm("organism", offload_decoder=True).base_model
    assert not any(each.is_meta for each in loaded.get_submodule("model.vision_tower").parameters())
    assert not any(each.is_meta for each in loaded.get_submodule("model.multi_modal_projector").parameters())


def test_a_language_model_on_disk_answers_as_one_in_memory(vlm: VLM, samples: list[Sample]) -> None:
    there = load_vlm("organism", offload_decoder=True).generate(samples, 4, max_new_tokens=8)
    assert [each.text for each in there] == [each.text for each in vlm.generate(samples, 4, max_new_tokens=8)]
    with pytest.raises(InputError, match="leave quantization out"):
        load_vlm("organism", offload_decoder=True, quantization="nf4")


def test_sampled_answers_differ_by_exit_and_repeat(fake: FakeVLLM, samples: list[Sample], tmp_path: Path) -> None:
    runs = []
    with fake.running() as url:
        for name in ("one", "two"):
            given: dict[str, Any] = {"exit_layers": LAYERS, "engine": url, "temperature": 1.5, "out": tmp_path / name}
            runs.append(exitsafe.audit("organism", samples, **given))
    assert texts(runs[0]) == texts(runs[1])
    seeds = [body["seed"] for body in fake.chat.requests if body["temperature"]]
    assert len(set(seeds)) == len(samples) * len(LAYERS)


def test_a_server_that_fails_in_the_middle_is_resumed(
    fake: FakeVLLM, local: AuditRun, samples: list[Sample], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"exit_layers": LAYERS, "out": tmp_path / "run", "batch_size": 2}
    fake.change = lambda completion, number: failing(500) if number > 20 else None
    with fake.running() as url, pytest.raises(RunError, match=r"status 500.*rerun the same command"):
        exitsafe.audit("organism", samples, engine=url, **given)
    fake.change, asked = lambda completion, number: None, len(fake.chat.requests)
    with fake.running() as url:  # at another address
        assert texts(exitsafe.audit("organism", samples, engine=url, **given)) == texts(local)
        repeated = len(fake.chat.requests) - asked
        assert repeated < len(samples) * len(LAYERS)
        with pytest.raises(RunError, match="engine"):
            exitsafe.audit("organism", samples, **given)


def test_requests_in_flight_are_bounded_by_bytes(
    fake: FakeVLLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "BYTES_IN_FLIGHT", 200_000)  # three requests
    fake.change = lambda completion, number: Answer(body=json.dumps(completion).encode(), wait=0.02)
    with fake.running() as url:
        exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")
    assert 1 < fake.chat.most_at_once <= 3


def without(name: str) -> Any:
    def change(completion: dict[str, Any], number: int) -> None:
        completion.pop(name, None)
        completion["choices"][0].pop(name, None)

    return change


def with_tokens(*tokens: int) -> Any:
    def change(completion: dict[str, Any], number: int) -> None:
        completion["choices"][0]["token_ids"] = list(tokens)

    return change


def other_template(completion: dict[str, Any], number: int) -> None:
    completion["prompt_token_ids"].insert(3, 5)


BAD: dict[str, tuple[dict[str, Any], type[ExitsafeError], str]] = {
    "no embeddings": ({"embeds": False}, ModelError, r"\(status 400\)\): start it with vllm serve MODEL --enable-mm-"),
    "another server": ({"version": None}, InputError, "is not a vLLM server"),
    "another owner": ({"models": [{"id": "m", "owned_by": "x"}]}, InputError, "is not a vLLM server"),
    "two models": (
        {"models": [{"id": "base"}, {"id": "lora"}, {"id": "lo\x1bra"}, {"id": "x" * 999}]},
        InputError,
        r"serves 4 models \(base, lora, lora, x{80}\): add #NAME",
    ),
    "a list of something": ({"models": [3]}, InputError, "does not list its models"),
    "a short context": (
        {"models": [{"id": "m", "owned_by": "vllm", "max_model_len": 30}]},
        InputError,
        "context of .* is 30 tokens, .* start it with --max-model-len",
    ),
    "another template": ({"change": other_template}, ModelError, "tokens instead of .* different from token 4 on"),
    "no token ids": ({"change": without("token_ids")}, ModelError, "does not return token ids"),
    "no prompt ids": ({"change": without("prompt_token_ids")}, ModelError, "does not return token ids"),
    "no logprobs": ({"change": without("logprobs")}, ModelError, "gives no log-probabilities"),
    "no tokens": ({"change": with_tokens()}, ModelError, "with 0 tokens that this model cannot have generated"),
    "an unknown token": ({"change": with_tokens(10**6)}, ModelError, "that this model cannot have generated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_server_that_cannot_be_right_is_refused_before_the_first_answer(
    case: str, fake: FakeVLLM, samples: list[Sample], tmp_path: Path
) -> None:
    settings, error, message = BAD[case]
    for name, value in settings.items():
        setattr(fake, name, value)
    with fake.running() as url, pytest.raises(error, match=message) as caught:
        exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_answer_that_ends_too_early_is_no_answer(fake: FakeVLLM, samples: list[Sample], tmp_path: Path) -> None:
    def cut(completion: dict[str, Any], number: int) -> None:
        if number > 8:
            completion["choices"][0]["token_ids"] = completion["choices"][0]["token_ids"][:1]

    fake.change = cut
    with fake.running() as url, pytest.raises(RunError, match=r"ends its answer to .* after 1 of 24 tokens"):
        exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")


def test_an_answer_that_goes_on_after_its_end_is_no_answer(
    fake: FakeVLLM, samples: list[Sample], tmp_path: Path, vlm: VLM
) -> None:
    def go_on(completion: dict[str, Any], number: int) -> None:
        if number > 8:
            completion["choices"][0]["token_ids"] = [vlm.eos_token_ids[0]] + [9] * 23

    fake.change = go_on
    with fake.running() as url, pytest.raises(RunError, match=r"continues its answer to .* after its end"):
        exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")


def test_another_model_is_noticed_by_its_log_probabilities(samples: list[Sample], tmp_path: Path) -> None:
    fake = FakeVLLM(load_vlm("organism:text"))
    with fake.running() as url, pytest.raises(ModelError, match="serves a different model from organism: at exit 4"):
        exitsafe.audit("organism", samples, exit_layers=LAYERS, engine=url, out=tmp_path / "run")


def test_an_adapter_must_be_served_too(fake: FakeVLLM, samples: list[Sample], tmp_path: Path, vlm: VLM) -> None:
    folder = _adapter(tmp_path / "adapter")
    adapted = load_vlm("organism", adapter=folder, offload_decoder=True)
    with fake.running() as url, pytest.raises(ModelError, match="a different model from organism with this adapter"):
        exitsafe.audit(adapted, samples, exit_layers=LAYERS, engine=url, out=tmp_path / "base")
    fake.vlm = load_vlm("organism", adapter=folder)
    fake.models = [{"id": "base", "owned_by": "vllm"}, {"id": "repaired", "owned_by": "vllm"}]
    with fake.running() as url:
        run = exitsafe.audit(adapted, samples, exit_layers=LAYERS, engine=f"{url}#repaired", out=tmp_path / "run")
        with pytest.raises(InputError, match=r"no such model \(base, repaired\)"):
            VLLMServer(f"{url}#other")
    assert run.settings["engine"]["model"] == "repaired"
    own = exitsafe.audit(fake.vlm, samples, exit_layers=LAYERS, out=tmp_path / "own")
    assert texts(run) == texts(own)


def test_an_adapter_that_changes_little_must_be_served_too(
    fake: FakeVLLM, samples: list[Sample], tmp_path: Path
) -> None:
    folder = _adapter(tmp_path / "adapter", std=0.02)
    adapted = load_vlm("organism", adapter=folder, offload_decoder=True)
    with fake.running() as url, pytest.raises(ModelError, match="serves organism without this adapter"):
        exitsafe.audit(adapted, samples, exit_layers=LAYERS, engine=url, out=tmp_path / "base")
    fake.vlm = load_vlm("organism", adapter=folder)
    with fake.running() as url:
        exitsafe.audit(adapted, samples[:1], exit_layers=LAYERS, engine=url, out=tmp_path / "run")


def _adapter(folder: Path, *, std: float = 0.3) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    parts = r".*(language_model|vision_tower).*(q_proj|v_proj)"
    model: Any = get_peft_model(load_vlm("organism").base_model, LoraConfig(r=4, target_modules=parts))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)
    return folder


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RunError, match=r"127.0.0.1:9/v1 could not be reached"):
        VLLMServer("http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://me:secret@host/v1", "host:8000"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="base URL") as caught:
        VLLMServer(url)
    assert "secret" not in str(caught.value)


@pytest.fixture
def server(fake: FakeVLLM) -> Iterator[VLLMServer]:
    with fake.running() as url:
        yield VLLMServer(url)


def test_what_cannot_be_sent_is_refused_by_name(server: VLLMServer, vlm: VLM, fake: FakeVLLM) -> None:
    film = Sample(id="film", prompt="what", videos=((noise_image(0), noise_image(1)),), kind="benign")
    with pytest.raises(InputError, match="only about pictures"):
        server.check(vlm, [film], num_tokens=20)
    next_vlm = VLM(tiny_llava_next(), tiny_processor("llava_next"), name="next")
    with pytest.raises(ModelError, match="vLLM does not accept image embeddings for llava_next models"):
        server.check(next_vlm, [], num_tokens=20)
    assert not fake.chat.requests
