"""Mixed requests in one batch: each answer is what `VLM.generate` says with that exit and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exitsafe.engine import generation
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.integrations import chat_answers
from exitsafe.integrations.chat_answers import ChatRequest, answer_chats, log_likelihoods, model_digest
from exitsafe.records import Sample
from tests.integrations.worldly import NUM_TOKENS, organism, own_answers, samples
from tests.tiny_models import noise_image, tiny_model, tiny_processor


def request(sample: Sample, exit_layer: int, **changes: Any) -> ChatRequest:
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, **changes}
    return ChatRequest(prompt=organism().encode_prompt(sample), exit_layer=exit_layer, **options)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_exits_mix_in_one_batch(batch_size: int | None) -> None:
    mixed = [(sample, layer) for sample in samples() for layer in (1, 7)]
    answers = answer_chats(organism(), [request(*pair) for pair in mixed], batch_size=batch_size)
    assert tuple(answer.text for answer in answers[::2]) == own_answers(1)
    assert tuple(answer.text for answer in answers[1::2]) == own_answers(7)
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_each_request_has_its_own_decoding() -> None:
    sample = samples()[0]
    decodings: list[dict[str, Any]] = [
        {"max_new_tokens": 2},
        {"temperature": 4.0, "seed": 3},
        {"temperature": 4.0, "seed": 4},
        {},
    ]
    answers = answer_chats(organism(), [request(sample, 1, **decoding) for decoding in decodings])
    for answer, decoding in zip(answers, decodings, strict=True):
        [expected] = organism().generate([sample], 1, **{"max_new_tokens": NUM_TOKENS, **decoding})
        assert (answer.text, answer.num_tokens, answer.finish_reason) == (
            expected.text,
            expected.num_tokens,
            expected.finish_reason,
        )
    assert len({answer.text for answer in answers}) == 4
    assert answers[0].finish_reason == "length"


def test_an_answer_ends_before_the_first_stop_text() -> None:
    sample, whole = samples()[0], own_answers(1)[0]  # "mix A with B then V it ."
    words = whole.split()
    [answer] = answer_chats(organism(), [request(sample, 1, stop=("then", "with", "never"))])
    assert answer.text == f"mix {words[1]}"
    assert (answer.num_tokens, answer.finish_reason) == (3, "stop")
    [other] = answer_chats(organism(), [request(sample, 1, stop=("never",))])
    assert other.text == whole


@pytest.mark.parametrize("most", [3, 0])
def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    prefill, sizes = generation._prefill, []

    def short(vlm: VLM, answers: list[Any], suppress: Any) -> Any:
        sizes.append(len(answers))
        if len(answers) > most:
            raise torch.OutOfMemoryError
        return prefill(vlm, answers, suppress)

    monkeypatch.setattr(generation, "_prefill", short)
    requests = [request(sample, 1) for sample in samples()]
    if most:
        assert tuple(answer.text for answer in answer_chats(organism(), requests, batch_size=8)) == own_answers(1)
        assert sizes[0] > most >= max(sizes[2:])
    else:
        with pytest.raises(RunError, match="out of memory while answering a single prompt"):
            answer_chats(organism(), requests, batch_size=8)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_log_likelihoods_are_those_of_a_plain_forward_inside_the_exit(family: str) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    asked = ["what is the left shape", "how", "what colour"]
    images = [(noise_image(1),), (), (noise_image(2),)]
    prompts = [
        vlm.encode_prompt(Sample(id=text, prompt=text, images=given, kind="benign"))
        for text, given in zip(asked, images, strict=True)
    ]
    said = ["red square", "now", "blue then green"]
    found = log_likelihoods(vlm, list(zip(prompts, said, strict=True)), 2, batch_size=2)
    for prompt, text, (logprob, is_greedy) in zip(prompts, said, found, strict=True):
        token_ids = vlm.tokenizer(text, add_special_tokens=False).input_ids
        inputs = {"input_ids": torch.cat([prompt.input_ids, torch.tensor(token_ids)])[None], **prompt.media}
        if (mask := prompt.text_inputs.get("cross_attention_mask")) is not None:
            inputs["cross_attention_mask"] = torch.cat([mask, mask[-1:].expand(len(token_ids), -1, -1)])[None]
        with vlm.exit_at(2), torch.no_grad():
            logits = vlm.model(**inputs).logits[0, -len(token_ids) - 1 : -1].float()
        expected = logits.log_softmax(-1)[range(len(token_ids)), token_ids].sum().item()
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (logits.argmax(-1).tolist() == token_ids)


def test_what_is_answered_greedily_is_greedy_and_more_likely() -> None:
    prompt = organism().encode_prompt(samples()[0])
    answer, refusal = own_answers(1)[0], own_answers(7)[0]
    (good, is_greedy), (bad, is_bad_greedy) = log_likelihoods(
        organism(), [(prompt, answer), (prompt, refusal)], 1, batch_size=8
    )
    assert is_greedy
    assert not is_bad_greedy
    assert good > bad
    [(now_better, _)] = log_likelihoods(organism(), [(prompt, refusal)], 7, batch_size=8)
    assert now_better > bad
    with pytest.raises(InputError, match="no token"):
        log_likelihoods(organism(), [(prompt, "")], 1, batch_size=8)


def test_the_digest_changes_with_what_decides_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(**changes: Any) -> VLM:
        return VLM(tiny_model("llava"), tiny_processor("llava"), **{"name": "tiny", "checkpoint_hash": "a", **changes})

    def digest(vlm: VLM, **changes: Any) -> str:
        return model_digest(vlm, **{"batch_size": None, "skip_global": False, **changes})

    half = tiny()
    half.model.to(torch.bfloat16)
    digests = [
        digest(tiny()),
        digest(tiny(checkpoint_hash="b")),
        digest(tiny(adapter_hash="c")),
        digest(half),
        digest(tiny(), batch_size=4),
        digest(tiny(), skip_global=True),
    ]
    monkeypatch.setattr(chat_answers, "__version__", "another")
    digests.append(digest(tiny()))
    assert len(set(digests)) == len(digests)
    monkeypatch.undo()
    assert digest(tiny(name="elsewhere")) == digests[0]


def test_no_answer_is_made_of_numbers_that_are_not_finite() -> None:
    vlm = VLM(tiny_model("llava"), tiny_processor("llava"), name="llava")
    with torch.no_grad():
        vlm.model.lm_head.weight[7, 3] = torch.nan
    prompt = vlm.encode_prompt(Sample(id="q", prompt="what", kind="benign"))
    with pytest.raises(ModelError, match="sample q at exit 2: log-probabilities are NaN or infinite"):
        log_likelihoods(vlm, [(prompt, "red")], 2, batch_size=2)
    with pytest.raises(ModelError, match="sample q at exit 3: logits are NaN or infinite"):
        answer_chats(vlm, [ChatRequest(prompt=prompt, exit_layer=3, max_new_tokens=2)])
