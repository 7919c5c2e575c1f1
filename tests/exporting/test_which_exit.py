from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.which_exit import repetition
from exitsafe.engine.endpoint import Endpoint
from exitsafe.engine.load import load_vlm
from exitsafe.engine.served_model import ServedModel
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, RunError
from exitsafe.exporting.candidates import (
    BILINEAR,
    CLASS_TOKEN,
    PADDED_BLACK,
    POST_NORM,
    Candidate,
    Reference,
    candidates_of,
    preparations_of,
)
from exitsafe.exporting.questions import Questions, choose
from exitsafe.exporting.served import Interview
from exitsafe.exporting.which_exit import WhichExit, which_exit
from tests.exporting.served_model import FakeServer
from tests.judges.chat_server import Answer, ChatServer, serving
from tests.tiny_models import NUM_LAYERS, tiny_llava, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def clip() -> VLM:
    return VLM(tiny_model("llava"), tiny_processor("llava"), name="tiny")


@pytest.fixture(scope="module")
def siglip() -> VLM:
    return VLM(tiny_model("llava-siglip"), tiny_processor("llava-siglip"), name="tiny-siglip")


@pytest.fixture(scope="module")
def organism() -> VLM:
    return load_vlm("organism")


def _at(url: str) -> ServedModel:
    return ServedModel(endpoint=Endpoint("m", base_url=url, max_retries=0), name="m")


def _ask(reference: VLM, served: FakeServer, claimed: int | None = None, **settings: Any) -> WhichExit:
    with served.serving() as url:
        found = which_exit(reference, _at(url), claimed=claimed, **settings)
    assert found.requests == len(served.samples) <= 64
    return found


@pytest.mark.parametrize("exit_layer", [0, 1, NUM_LAYERS - 1, NUM_LAYERS])
def test_every_exit_is_named(siglip: VLM, exit_layer: int) -> None:
    found = _ask(siglip, FakeServer(siglip, Candidate(exit_layer)))
    assert (found.verdict, found.exit_layer, found.fault) == ("established", exit_layer, "")
    assert found.is_as_claimed and found.preparation == ""
    assert found.decided_after <= 10 and found.nearest.distance < 1e-3


@pytest.mark.parametrize(("exit_layer", "fault"), [(5, CLASS_TOKEN), (2, POST_NORM)])
def test_faults_are_named(clip: VLM, exit_layer: int, fault: str) -> None:
    found = _ask(clip, FakeServer(clip, Candidate(exit_layer, fault)), claimed=5, max_requests=24)
    assert (found.verdict, found.exit_layer, found.fault) == ("established", exit_layer, fault)
    assert not found.is_as_claimed
    assert found.differing is not None and found.differing[0] > 0 and found.requests == 24


@pytest.mark.parametrize("preparation", [PADDED_BLACK, BILINEAR])
def test_another_preparation_of_pictures_is_named_and_does_not_change_the_exit(organism: VLM, preparation: str) -> None:
    found = _ask(organism, FakeServer(organism, Candidate(7, "", preparation)), claimed=7)
    assert found.is_as_claimed and found.preparation == preparation


def test_from_answers_alone(organism: VLM) -> None:
    found = _ask(organism, FakeServer(organism, Candidate(6), has_logprobs=False), claimed=7, max_requests=40)
    assert (found.verdict, found.exit_layer, found.has_logprobs) == ("established", 6, False)
    assert found.limit is None and found.nearest.distance == 0


def test_a_server_that_refuses_log_probabilities_is_asked_without(organism: VLM) -> None:
    model = FakeServer(organism, Candidate(6), has_logprobs=False)

    def script(body: dict[str, Any], number: int) -> Answer:
        refusal = {"error": {"message": "logprobs is not supported", "param": "logprobs"}}
        return Answer(status=400, body=json.dumps(refusal).encode()) if "logprobs" in body else model.answer(body, 0)

    with serving(ChatServer(script)) as url:
        assert which_exit(organism, _at(url)).exit_layer == 6


def test_other_weights_are_none_of_its_exits(clip: VLM) -> None:
    other = tiny_llava()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std().nan_to_num())
    served = FakeServer(VLM(other, clip.processor, name="other"), Candidate(5))
    found = _ask(clip, served, claimed=5, max_requests=24)
    assert (found.verdict, found.exit_layer, found.candidates) == ("excluded", None, ())
    assert found.limit is not None and found.nearest.distance > found.limit
    assert found.differing is not None and found.differing[0] > 0


def test_candidates_that_answer_alike_cannot_be_distinguished(organism: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At exit 0 the post-norm hardly changes an answer, and answers are all there is."""
    monkeypatch.setattr("exitsafe.exporting.questions._MOST_STUDIED", 24)
    found = _ask(organism, FakeServer(organism, Candidate(0), has_logprobs=False), claimed=1)
    assert found.verdict == "undecided" and found.exit_layer == 0 and not found.is_as_claimed
    assert [(each.exit_layer, each.fault) for each in found.candidates] == [(0, ""), (0, POST_NORM)]


def test_a_language_model_in_8_bits_is_still_recognised(organism: VLM) -> None:
    served = VLM(copy.deepcopy(organism.base_model), organism.processor, name="8 bits", encoder=organism.encoder)
    for module in served.base_model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    found = _ask(organism, FakeServer(served, Candidate(4)), claimed=4)
    assert found.is_as_claimed and found.deviation is not None and 1e-3 < found.deviation < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_neighbouring_exits_under_quantised_weights(organism: VLM, bits: int) -> None:
    """A small version of `python -m benchmarks.which_exit`."""
    outcomes = [repetition(organism, seed, bits=bits, has_logprobs=True)[0] for seed in range(12)]
    assert "wrong" not in outcomes
    assert bits == 4 or outcomes == ["right"] * 12


def test_a_text_only_server(clip: VLM) -> None:
    with pytest.raises(RunError, match=r"did not answer a question with a picture: .* takes pictures"):
        _ask(clip, FakeServer(clip, Candidate(5), takes_pictures=False))


def test_a_server_that_dies(clip: VLM) -> None:
    with FakeServer(clip, Candidate(5)).serving() as url:
        pass
    with pytest.raises(RunError, match="could not be reached"):
        which_exit(clip, _at(url))


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "zz", "logprob": -1.0, "top_logprobs": [{"token": "qq", "logprob": -1.0}]}]},
        {"content": [{"token": "red", "logprob": 7.0, "top_logprobs": [{"token": "red", "logprob": 1e300}] * 500}]},
        {"content": "nonsense"},
    ],
)
def test_nonsense_is_no_exit(clip: VLM, logprobs: object) -> None:
    choice = {"message": {"content": "zz " * 10_000}, "finish_reason": "stop", "logprobs": logprobs}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10**8}}).encode()
    with serving(ChatServer(lambda request, number: Answer(body=body))) as url:
        found = which_exit(clip, _at(url))
    assert found.verdict == "excluded" and "100000000 tokens on the server" in found.remarks[0]


def _without(server: FakeServer, takes_away: Callable[[dict[str, Any], int], bool], left: object) -> ChatServer:
    """The server, whose answers have other log-probabilities where `takes_away` says so."""

    def script(body: dict[str, Any], number: int) -> Answer:
        said = json.loads(server.answer(body, number).encoded())
        if takes_away(body, number) and "logprobs" in said["choices"][0]:
            said["choices"][0]["logprobs"] = left
        return Answer(body=json.dumps(said).encode())

    return ChatServer(script)


@pytest.mark.parametrize("left", [None, {"content": []}, {"content": [{"token": "a", "logprob": float("nan")}]}])
def test_a_server_with_log_probabilities_for_texts_only_is_asked_without(organism: VLM, left: object) -> None:
    server = FakeServer(organism, Candidate(6))
    script = _without(server, lambda body, _: isinstance(body["messages"][0]["content"], list), left)
    with serving(script, paths={"/v1/models": Answer(body=b'{"data": [{"id": "m"}]}')}) as url:
        found = which_exit(organism, _at(url))
    assert (found.verdict, found.exit_layer, found.has_logprobs) == ("established", 6, False)


def test_log_probabilities_that_end_are_no_proof_of_another_model(clip: VLM) -> None:
    script = _without(FakeServer(clip, Candidate(5)), lambda _, number: number > 5, None)
    with (
        serving(script, paths={"/v1/models": Answer(body=b'{"data": [{"id": "m"}]}')}) as url,
        pytest.raises(RunError, match="none with a later one: check that the address leads to a single server"),
    ):
        which_exit(clip, _at(url))


def test_what_costs_nothing_is_checked_first(clip: VLM) -> None:
    """How llama.cpp and vLLM tell their template and context."""
    model = FakeServer(clip, Candidate(5))
    prompt = "USER: is the square red ASSISTANT:"
    tokens = clip.encode_prompt(Questions(clip).text_question(0)).input_ids.tolist()
    told = {
        "as the reference's": ({"props": {}, "apply-template": {"prompt": prompt}}, {"tokenize": {"tokens": tokens}}),
        "differently": (
            {"props": {}, "apply-template": {"prompt": f"SYSTEM: {prompt}"}},
            {"tokenize": {"tokens": tokens[1:]}},
        ),
    }
    for remark, servers in told.items():
        for paths in servers:
            with model.serving(**paths) as url:
                interview = Interview(model=_at(url), vlm=clip, max_tokens=4)
                assert remark in " ".join(interview.remarks([Questions(clip).text_question(0)]))
    with model.serving(props={"default_generation_settings": {"n_ctx": 9}}) as url:
        with pytest.raises(RunError, match="has a context of 9 tokens"):
            which_exit(clip, _at(url))
        with pytest.raises(RunError, match="has a context of 8 tokens"):
            which_exit(clip, dataclasses.replace(_at(f"{url}/v1"), context_length=8))
    assert not model.samples


def test_claims_beyond_the_encoder_are_refused(clip: VLM) -> None:
    with pytest.raises(ExitLayerError, match="choose 1 to 6"):
        which_exit(clip, _at("http://127.0.0.1:9/v1"), claimed=7)


def test_faults_that_a_model_cannot_have_are_left_out(clip: VLM, siglip: VLM) -> None:
    assert {each.fault for each in candidates_of(clip)} == {"", CLASS_TOKEN, POST_NORM}
    assert {each.fault for each in candidates_of(siglip)} == {"", POST_NORM}
    tapped = VLM(tiny_llava(vision_feature_layer=[2, 4]), tiny_processor("llava"), name="taps")
    assert max(each.exit_layer for each in candidates_of(tapped)) == tapped.default_exit == 4
    assert preparations_of(clip, Candidate(5))[0].preparation == ""


def test_the_reference_at_an_exit_is_the_model_at_that_exit(clip: VLM) -> None:
    sample = Questions(clip).picture_question(0)
    rows = Reference(clip, max_new_tokens=4).rows(sample, candidates_of(clip))
    (own,) = clip.prompt_features([clip.encode_prompt(sample)], clip.exit_layers)
    by_candidate = dict(zip(candidates_of(clip), rows, strict=True))
    for exit_layer in clip.exit_layers:
        features = own[exit_layer]
        assert features is not None
        wanted = _pooled(features)
        found = {
            fault: _pooled(by_candidate[Candidate(exit_layer, fault)].features)
            for fault in ("", CLASS_TOKEN, POST_NORM)
        }
        assert torch.equal(found[""], wanted)
        assert not any(torch.allclose(found[fault], found[""]) for fault in (CLASS_TOKEN, POST_NORM))


def test_the_class_token_fault_is_llama_cpps(clip: VLM) -> None:
    """Patches first, each with the position of its left neighbour; the class token last; the first patch is lost."""
    sample = Questions(clip).picture_question(3)
    (row,) = Reference(clip, max_new_tokens=4).rows(sample, [Candidate(2, CLASS_TOKEN)])
    tower: Any = clip.base_model.model.vision_tower
    pixels = clip.encode_prompt(sample).media["pixel_values"]
    with torch.no_grad():
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches, tower.embeddings.class_embedding.expand(1, 1, -1)], dim=1)
        hidden = tower.pre_layrnorm(tokens + tower.embeddings.position_embedding.weight)
        for block in clip.encoder_blocks[:2]:
            hidden = block(hidden, None)
        wanted = clip.projector(hidden[:, 1:])
    assert torch.allclose(_pooled(row.features), wanted.flatten(0, 1), atol=1e-5)


def test_preparations_leave_the_processor_as_it_was(organism: VLM) -> None:
    reference, sample = Reference(organism, max_new_tokens=4), Questions(organism).odd_question(0)
    before = reference.prompt(sample).media["pixel_values"]
    others = [
        reference.prompt(sample, each.preparation).media["pixel_values"]
        for each in preparations_of(organism, Candidate(7))[1:]
    ]
    assert others and not any(torch.equal(before, other) for other in others)
    assert torch.equal(before, reference.prompt(sample).media["pixel_values"])


def test_the_question_that_separates_the_closest_two_is_chosen() -> None:
    asked = np.array([9.0, 0.0, 9.0])
    offered = {0: np.array([9.0, 0.1, 9.0]), 1: np.array([1.0, 2.0, 0.0])}
    assert choose(asked, offered, unit=0.05) == 1


def test_questions_are_the_same_every_time(organism: VLM) -> None:
    one, two = (Questions(organism).picture_question(5) for _ in range(2))
    assert one.prompt == two.prompt and one.images[0].tobytes() == two.images[0].tobytes()  # type: ignore[union-attr]
    assert dataclasses.replace(one, images=()) == dataclasses.replace(two, images=())


def _pooled(features: Any) -> torch.Tensor:
    return torch.cat([each.flatten(0, -2) for each in features["image"].pooler_output])
