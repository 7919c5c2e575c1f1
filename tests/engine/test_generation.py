"""Generation: equal to stock `generate` per sample, whatever the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from exitsafe.engine.generation import Answer, Sampling, generate_answers, suppress_logits
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError
from exitsafe.records import Sample
from tests.tiny_models import noise_image, tiny_llava, tiny_model, tiny_processor


def stock_answer(vlm: VLM, sample: Sample, exit_layer: int, *, max_new_tokens: int) -> list[int]:
    """Stock transformers, one sample at a time."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in sample.images]
    inputs = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": sample.prompt}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with vlm.exit_at(exit_layer):
        tokens = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer: list[int] = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


def rows_of(vlm: VLM, samples: list[Sample], exit_layers: list[int]) -> list[Row]:
    prompts = [vlm.encode_prompt(sample) for sample in samples]
    features = vlm.prompt_features(prompts, sorted(set(exit_layers)))
    return [
        Row(prompt=prompt, exit_layer=exit_layer, features=found[exit_layer])
        for prompt, exit_layer, found in zip(prompts, exit_layers, features, strict=True)
    ]


def complete(vlm: VLM, rows: list[Row], **settings: Any) -> list[tuple[int, ...]]:
    found = dict(vlm.complete(rows, **({"max_new_tokens": 12, "temperature": 0.0, "seed": 0} | settings)))
    assert sorted(found) == list(range(len(rows)))
    return [found[index].token_ids for index in range(len(rows))]


def test_greedy_equals_stock_token_for_token(vlm: VLM, samples: list[Sample]) -> None:
    # Twice the samples at two exits each: the queue refills while rows finish at different times.
    many, exits = samples * 2, [1, 2, 3, 4, 5, 6, 1, 6, 5, 4, 3, 2, 1, 3]
    expected = [stock_answer(vlm, *pair, max_new_tokens=8) for pair in zip(many, exits, strict=True)]
    assert len({len(answer) for answer in expected}) > 2, "answers must end at different times for this test to bite"
    rows = rows_of(vlm, many, exits)
    for batch_size in (1, 3, 7):
        answers = complete(vlm, rows, batch_size=batch_size, max_new_tokens=8)
        assert [list(answer) for answer in answers] == expected


@torch.no_grad()
def test_mixed_rows_have_the_logits_of_single_runs(vlm: VLM, samples: list[Sample]) -> None:
    with_one_image = [sample for sample in samples if len(sample.images) == 1]
    exits = list(vlm.exit_layers)[: len(with_one_image)]
    rows = rows_of(vlm, with_one_image, exits)
    responses = [torch.tensor([9, 10, 11, 12][: 1 + index % 4]) for index in range(len(rows))]
    hidden, tokens, mask = vlm.response_states(rows, responses)
    together = vlm.logits(hidden)
    for index, row in enumerate(rows):
        alone = vlm.logits(vlm.response_states([row], [responses[index]])[0])[0]
        torch.testing.assert_close(together[index][mask[index]], alone, rtol=0, atol=1e-5)
        assert tokens[index][mask[index]].tolist() == responses[index].tolist()


@torch.no_grad()
def test_response_states_predict_what_generation_chose(vlm: VLM, samples: list[Sample]) -> None:
    for row in rows_of(vlm, samples, [4] * len(samples)):
        # A generated image token has no image behind it, so scoring needs it suppressed.
        (answer,) = complete(vlm, [row], batch_size=1, suppress=vlm.special_token_ids)
        hidden, tokens, mask = vlm.response_states([row], [torch.tensor(answer)])
        assert mask.all()
        logits = suppress_logits(vlm.logits(hidden), vlm.special_token_ids)
        assert logits.argmax(dim=-1).tolist() == tokens.tolist() == [list(answer)]


def test_draws_do_not_depend_on_the_batch(vlm: VLM, samples: list[Sample]) -> None:
    exits = [1, 2, 3, 4, 5, 6, 1]
    rows = rows_of(vlm, samples, exits)
    first = complete(vlm, rows, temperature=1.0, batch_size=7)
    order = list(range(7))
    random.Random(3).shuffle(order)
    shuffled = complete(vlm, [rows[index] for index in order], temperature=1.0, batch_size=2)
    assert [shuffled[order.index(index)] for index in range(7)] == first
    for other in ({"seed": 1}, {"draw": 1}):
        assert complete(vlm, rows, temperature=1.0, batch_size=7, **other) != first


def test_each_exit_and_sample_draws_its_own() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    sample = Sample(id="a", prompt="what colour", images=(noise_image(1),), kind="benign")
    (row,) = rows_of(vlm, [sample], [3])
    others = [
        replace(row, exit_layer=2),  # with the features of exit 3: only the draw can differ
        replace(row, prompt=replace(row.prompt, sample_id="b")),
    ]
    first, *found = complete(vlm, [row, *others], temperature=1.0, batch_size=1)
    assert all(tokens != first for tokens in found)


def test_draws_follow_the_distribution() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    sample = Sample(id="a", prompt="what colour", images=(noise_image(1),), kind="benign")
    (row,) = rows_of(vlm, [sample], [3])
    hidden, _, _ = vlm.response_states([row], [torch.tensor([9])])
    suppressed = vlm.special_token_ids
    logits = vlm.logits(hidden)[0, 0].detach()
    logits[list(suppressed)] = float("-inf")
    expected = (logits / 0.8).softmax(dim=-1)
    num_draws = 4000
    found = complete(vlm, [row] * num_draws, temperature=0.8, max_new_tokens=1, batch_size=500, suppress=suppressed)
    assert len(set(found)) == 1, "one key, one draw"
    renamed = [replace(row.prompt, sample_id=f"d{n}") for n in range(num_draws)]
    rows = [Row(prompt=prompt, exit_layer=3, features=row.features) for prompt in renamed]
    found = complete(vlm, rows, temperature=0.8, max_new_tokens=1, batch_size=500, suppress=suppressed)
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=len(expected)) / num_draws
    assert counts[list(suppressed)].sum() == 0
    # Four standard errors of the most uncertain rate.
    assert (counts - expected).abs().max() < 4 * 0.5 / num_draws**0.5


def test_generate_checks_its_input() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    sample = Sample(id="a", prompt="what", images=(noise_image(1),), kind="benign")
    with pytest.raises(InputError, match="2 exit layers for 1 samples"):
        vlm.generate([sample], [1, 2])
    with pytest.raises(ExitLayerError, match="choose 1 to 6"):
        vlm.generate([sample], 9)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(InputError, match="choose"):
            vlm.generate([sample], 1, **wrong)
    assert vlm.generate([], 1) == []


def test_sliding_window_layers_are_not_refilled() -> None:
    """A cache that forgets cannot be joined; answers stay right."""
    model = tiny_model("llava")
    vlm = VLM(model, tiny_processor("llava"), name="tiny")
    config = model.config.text_config
    config.sliding_window = 4096
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    many = [
        Sample(id=f"s{n}", prompt="what colour " * (1 + n), images=(noise_image(n),), kind="benign") for n in range(5)
    ]
    answers = complete(vlm, rows_of(vlm, many, [2] * 5), batch_size=2)
    assert [list(answer) for answer in answers] == [stock_answer(vlm, sample, 2, max_new_tokens=12) for sample in many]


@pytest.mark.parametrize("seed", [18, 22, 41, 55])
def test_image_states_are_not_cut_when_they_are_as_wide_as_the_text(seed: int) -> None:
    """Llama 3.2 Vision keeps image states, 20 wide here, in the same cache. With these seeds a row leaves when the text
    is 20 wide too, so that telling the two apart by their width would cut the image states."""
    vlm = VLM(tiny_model("mllama"), tiny_processor("mllama"), name="tiny")
    draw = random.Random(seed)
    words = ["what", "colour", "is", "the", "left", "shape", "red", "blue", "green"]
    many = [
        Sample(
            id=f"s{n}",
            prompt=" ".join(draw.choices(words, k=draw.randint(3, 16))),
            images=(noise_image(n),),
            kind="benign",
        )
        for n in range(6)
    ]
    rows = rows_of(vlm, many, [1, 3, 5, 2, 4, 6])
    alone = [complete(vlm, [row], batch_size=1)[0] for row in rows]
    assert complete(vlm, rows, batch_size=4) == alone


def test_rows_that_arrive_while_others_are_answered(vlm: VLM, samples: list[Sample]) -> None:
    """One more row before each step, pictures or not, each with its own length and temperature."""
    exits = [1, 2, 3, 4, 5, 6, 1]
    rows = rows_of(vlm, samples, exits)
    samplings = [
        Sampling(max_new_tokens=3 + 2 * place, temperature=float(place % 2), seed=place) for place in range(len(rows))
    ]
    expected = [
        complete(vlm, [row], batch_size=1, **{name: getattr(each, name) for name in DECODING})[0]
        for row, each in zip(rows, samplings, strict=True)
    ]
    answers = [Answer(row=row, sampling=sampling) for row, sampling in zip(rows, samplings, strict=True)]
    waiting, sizes = list(answers), []

    def take(most: int, beside: Sequence[Answer]) -> list[Answer]:
        sizes.append(len(beside))
        keys = {vlm.batch_key(answer.row.prompt) for answer in (*beside, *waiting[:1])}
        return [waiting.pop(0)] if waiting and len(keys) == 1 else []

    for _ in range(len(answers)):  # a batch that nothing may join ends first
        for answer in generate_answers(vlm, take, batch_size=8):
            assert answer.token_ids
    assert [tuple(answer.token_ids) for answer in answers] == expected
    assert max(sizes) > 1 or not vlm.can_pad


DECODING = ("max_new_tokens", "temperature", "seed")


def test_a_reader_may_end_an_answer(vlm: VLM, samples: list[Sample]) -> None:
    rows = rows_of(vlm, samples[:1] * 2, [2, 3])
    expected = [complete(vlm, [row], batch_size=1)[0] for row in rows]
    answers = [Answer(row=row, sampling=Sampling(max_new_tokens=12)) for row in rows]
    waiting = list(answers)
    for answer in generate_answers(vlm, lambda most, beside: [waiting.pop(0)] if waiting else [], batch_size=2):
        if answer is answers[0] and len(answer.token_ids) == 2:
            answer.finish_reason = "stop"
    assert [tuple(answer.token_ids) for answer in answers] == [expected[0][:2], expected[1]]


@torch.no_grad()
def test_logprobs_are_those_of_a_teacher_forced_pass(vlm: VLM, samples: list[Sample]) -> None:
    row = rows_of(vlm, samples[:1], [4])[0]
    plain, greedy, drawn = (
        Answer(row=row, sampling=Sampling(max_new_tokens=6, temperature=temperature, top_logprobs=top))
        for temperature, top in ((0.0, None), (0.0, 3), (2.0, 10**6))
    )
    waiting = [plain, greedy, drawn]
    for _ in generate_answers(vlm, lambda most, beside: [waiting.pop()] if waiting else [], batch_size=4):
        pass
    assert plain.logprobs == []
    for answer, num_top in ((greedy, 3), (drawn, None)):
        hidden, _, _ = vlm.response_states([row], [torch.tensor(answer.token_ids)])
        expected = vlm.logits(hidden)[0].log_softmax(dim=-1)
        assert len(answer.logprobs) == len(answer.token_ids)
        for found, every, token in zip(answer.logprobs, expected, answer.token_ids, strict=True):
            assert found.chosen == pytest.approx(float(every[token]), abs=1e-4)
            assert len(found.top) == (num_top or len(every))
            tokens, logprobs = map(list, zip(*found.top, strict=True))
            assert logprobs == sorted(logprobs, reverse=True)
            torch.testing.assert_close(torch.tensor(logprobs), every[tokens], rtol=0, atol=1e-4)
    assert [tokens.top[0][0] for tokens in greedy.logprobs] == greedy.token_ids


@pytest.mark.gpu
def test_rows_finish_at_different_times_on_a_gpu() -> None:
    vlm = VLM(tiny_model("llava").to("cuda"), tiny_processor("llava"), name="tiny")
    many = [
        Sample(id=f"s{n}", prompt="what colour " * (1 + n), images=(noise_image(n),), kind="benign") for n in range(5)
    ]
    for temperature in (0.0, 1.0):
        answers = complete(vlm, rows_of(vlm, many, [2] * 5), batch_size=3, temperature=temperature)
        assert len({len(answer) for answer in answers}) > 1
