"""Over HTTP: every exit answers as `VLM.generate` does there, whole or streamed, alone or among others."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI

from exitsafe.engine import generation
from exitsafe.engine.prompts import Row
from exitsafe.serve import app as app_module
from exitsafe.serve import worker as worker_module
from exitsafe.version import __version__
from tests.serve.served import JSON, PATH, Served, serving, turns, until
from tests.serve.worldly import NUM_TOKENS, organism, own_answers, samples

LAYERS = tuple(range(1, 9))


def body(number: int = 0, model: str = "organism@L1", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": turns(samples()[number]), "max_tokens": NUM_TOKENS, **options}


def test_the_models_are_the_exits(server: Served) -> None:
    status, found = server.send("GET", "/v1/models")
    assert status == 200
    exits = {entry["id"]: entry["exit_layer"] for entry in found["data"]}
    assert exits == {"organism": 7} | {f"organism@L{layer}": layer for layer in LAYERS}
    assert {entry["max_model_len"] for entry in found["data"]} == {organism().context_length}
    assert server.send("GET", "/v1/models/organism@L3") == (200, found["data"][3])
    assert server.send("GET", "/v1/models/organism@L9")[0] == 404
    assert server.send("GET", "/version") == (200, {"version": __version__})
    assert server.send("GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("layer", LAYERS)
def test_every_exit_gives_its_own_answers(server: Served, layer: int) -> None:
    found = tuple(server.text(body(number, f"organism@L{layer}")) for number in range(len(samples())))
    assert found == own_answers(layer)


def test_the_name_alone_is_the_default_exit_and_answers_differ_between_exits(server: Served) -> None:
    found = tuple(server.text(body(number, "organism")) for number in range(len(samples())))
    assert found == own_answers(7) != own_answers(1)


def test_a_reply_has_openais_shape(server: Served) -> None:
    reply = server.answer(body())
    [response] = organism().generate(samples()[:1], 1, max_new_tokens=NUM_TOKENS)
    num_prompt_tokens = len(organism().encode_prompt(samples()[0]).input_ids)
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "organism@L1"
    assert reply["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": response.num_tokens,
        "total_tokens": num_prompt_tokens + response.num_tokens,
    }
    [choice] = reply["choices"]
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert server.answer(body(max_tokens=2))["choices"][0]["finish_reason"] == "length"


def test_openais_own_client_can_be_used(server: Served) -> None:
    client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    arguments: Any = body(logprobs=True, top_logprobs=1)
    assert client.chat.completions.create(**arguments).choices[0].message.content == own_answers(1)[0]
    chunks = client.chat.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own_answers(1)[0]
    with pytest.raises(BadRequestError, match="does not support top_p"):
        client.chat.completions.create(**arguments, top_p=0.5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 7])
def test_logprobs_are_those_of_a_teacher_forced_pass_at_the_exit(server: Served, layer: int) -> None:
    vocabulary = organism().text_config.vocab_size
    reply = server.answer(body(3, f"organism@L{layer}", logprobs=True, top_logprobs=vocabulary))
    content = reply["choices"][0]["logprobs"]["content"]
    prompt = organism().encode_prompt(samples()[3])
    row = Row(prompt=prompt, exit_layer=layer, features=organism().prompt_features([prompt], [layer])[0][layer])
    token_ids = [token["id"] for token in content]
    hidden, _, _ = organism().response_states([row], [torch.tensor(token_ids)])
    expected = organism().logits(hidden)[0].log_softmax(dim=-1)
    assert organism().decode(token_ids) == own_answers(layer)[3]
    assert len(content) == reply["usage"]["completion_tokens"]
    for token, every in zip(content, expected, strict=True):
        assert token["logprob"] == pytest.approx(float(every[token["id"]]), abs=1e-4)
        found = torch.tensor([each["logprob"] for each in sorted(token["top_logprobs"], key=lambda each: each["id"])])
        torch.testing.assert_close(found, every, rtol=0, atol=1e-3)
        assert token["top_logprobs"][0]["id"] == token["id"], "greedy"
        assert bytes(token["bytes"]).decode() == token["token"] == organism().tokenizer.decode([token["id"]])


def test_a_streamed_answer_is_the_whole_one_token_by_token(server: Served) -> None:
    chunks = server.stream(body(stream_options={"include_usage": True}, logprobs=True))
    *parts, last = chunks
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in parts]
    whole = server.answer(body(logprobs=True))
    assert "".join(texts) == own_answers(1)[0]
    assert len([text for text in texts if text]) == len(own_answers(1)[0].split()), "words as they come"
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in parts)
    tokens = [token["id"] for chunk in parts for token in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == [token["id"] for token in whole["choices"][0]["logprobs"]["content"]]
    assert "usage" not in server.stream(body())[0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_ends_before_the_first_stop_text(server: Served, is_streamed: bool) -> None:
    words = own_answers(1)[0].split()  # mix A with B then V it .
    for stop, expected, num_tokens in (
        (["then", "with", "never"], f"mix {words[1]}", 3),
        (f"{words[1]} with", "mix", 3),
        ([f"with {words[3]} it"], own_answers(1)[0], None),  # begins like a stop text and is none
        (["mix"], "", 1),
    ):
        if is_streamed:
            chunks = server.stream(body(stop=stop, stream_options={"include_usage": True}))
            text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
            finish, used = chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
        else:
            reply = server.answer(body(stop=stop))
            text, finish = reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]
            used = reply["usage"]
        assert (text, finish) == (expected, "stop")
        assert num_tokens in (used["completion_tokens"], None)


def test_draws_repeat_with_a_seed_and_differ_without(server: Served) -> None:
    seeded = [server.text(body(temperature=4.0, seed=seed)) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({server.text(body(temperature=4.0)) for _ in range(4)}) > 1
    assert server.text(body(temperature=4.0, seed=1, user="somebody", model="organism@L2")) != seeded[0]


def test_conversations_have_all_their_turns(server: Served) -> None:
    before = [
        {"role": "system", "content": "not allowed :"},
        *turns(samples()[1]),
        {"role": "assistant", "content": [{"type": "text", "text": "yes ."}], "tool_calls": None},
    ]
    alone = server.answer(body(max_tokens=4))
    found = server.answer(body(max_tokens=4) | {"messages": [*before, *turns(samples()[0])]})
    assert found["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"] + 16


def test_sixty_four_at_once_are_answered_as_one_by_one(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed exits, lengths, temperatures, streamed and whole, in shared batches."""
    bodies = [
        body(
            place % len(samples()),
            f"organism@L{1 + place % 8}",
            max_tokens=(4, 12, NUM_TOKENS)[place % 3],
            temperature=(0, 0, 0, 1.5)[place % 4],
            seed=place,
        )
        for place in range(64)
    ]
    expected = [server.text(each) for each in bodies]
    assert len(set(expected)) > 10
    sizes, join = [], generation._Batch.join

    def joined(mine: Any, other: Any) -> Any:
        both = join(mine, other)
        sizes.append(len({answer.row.exit_layer for answer in both.answers}))
        return both

    monkeypatch.setattr(generation._Batch, "join", joined)

    def ask(place: int) -> str:
        if place % 5:
            return server.text(bodies[place])
        return "".join(chunk["choices"][0]["delta"]["content"] for chunk in server.stream(bodies[place]))

    with ThreadPoolExecutor(64) as callers:
        assert list(callers.map(ask, range(64))) == expected
    assert max(sizes) > 2, "exits share batches"


def leave_early(port: int, request: dict[str, Any]) -> None:
    """Send a request and leave after the first bytes of the reply, or before them if it is not streamed."""
    content = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if request.get("stream"):
            client.recv(64)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_place(monkeypatch: pytest.MonkeyPatch, is_streamed: bool) -> None:
    monkeypatch.setattr(organism(), "eos_token_ids", ())  # answers run on
    decode, steps = generation._Batch.decode, list[int]()

    def slowly(self: Any, *arguments: Any) -> None:
        time.sleep(0.02)
        steps.append(len(self.answers))
        decode(self, *arguments)

    monkeypatch.setattr(generation._Batch, "decode", slowly)
    with serving(organism()) as own:
        leave_early(own.port, body(stream=is_streamed, max_tokens=90))
        until(lambda: own.log)
        assert own.log[0].split()[1:3] == ["organism@L1", "499"]
        until(lambda: not own.service.worker._running)
        assert len(steps) < 60, "the rest is not generated"
        assert own.service.num_requests == 0
        assert own.answer(body(max_tokens=2))["usage"]["completion_tokens"] == 2


def test_the_log_has_ids_and_numbers_and_no_text(server: Served, capfd: pytest.CaptureFixture[str]) -> None:
    server.log.clear()
    server.answer(body())
    server.stream(body())
    server.ask(body(top_p=0.1))
    server.ask(body() | {"model": "a secret"})
    server.send("GET", "/a/secret?of=mine")
    until(lambda: len(server.log) == 4)
    assert sorted(line.split()[2] for line in server.log) == ["200", "200", "400", "404"]
    assert all(line.startswith("chatcmpl-") and line.endswith(" s") for line in server.log)
    said = "\n".join([*server.log, *capfd.readouterr()])
    assert not [word for word in ("secret", "mix", samples()[0].prompt, "base64") if word in said]


def test_a_key_is_demanded_where_there_is_one() -> None:
    with serving(organism(), key="s3cret") as own:
        assert own.ask(body(), authorization="Bearer s3cret")[0] == 200
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "s3cret"}, {"authorization": "é"}):
            status, found = own.ask(body(), **headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert own.send("GET", "/v1/models")[0] == 401
        assert own.send("GET", "/health")[0] == 200


def test_no_other_name_reaches_a_local_server(server: Served) -> None:
    for host in ("127.0.0.1", "localhost:80", "[::1]"):
        assert server.send("GET", "/v1/models", headers={"host": host})[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:80"):
        assert server.send("GET", "/v1/models", headers={"host": host})[0] == 403


def test_too_many_requests_are_turned_away(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MOST_REQUESTS", 0)
    status, found = server.ask(body())
    assert (status, found["error"]["code"]) == (429, "busy")


def test_large_requests_wait_for_each_other(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MOST_BYTES_TOGETHER", 3 * len(json.dumps(body())) // 2)
    for _ in range(4):  # each gives its bytes back
        assert server.ask(body())[0] == 200
    monkeypatch.setattr(app_module, "MOST_BYTES_TOGETHER", len(json.dumps(body())) // 2)
    for _ in range(2):
        status, found = server.ask(body())
        assert (status, found["error"]["code"]) == (429, "busy")
    monkeypatch.undo()
    assert server.text(body()) == own_answers(1)[0]


def test_a_body_that_never_comes_is_given_up(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON['content-type']}\r\n".encode())
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in client.recv(200)


def test_of_an_error_that_nobody_foresaw_only_type_and_place_are_told(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a secret")

    for place in (app_module, worker_module):
        with monkeypatch.context() as patch:
            patch.setattr(place, "parse_request" if place is app_module else "encode_chat", fail)
            for options in ({}, {"stream": True}):
                status, reply = server.ask(body() | options)
                assert (status, reply["error"]["type"]) == (500, "server_error")
                place_of_error = r"unexpected ZeroDivisionError in test_server.py, line \d+"
                assert re.fullmatch(place_of_error, reply["error"]["message"])
    assert "secret" not in "".join(server.log)
