"""`exitsafe serve` as a process: its ready line, its end, and what it refuses before it loads a model."""

from __future__ import annotations

import json
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run
from exitsafe.serve.app import served_models
from tests.serve.process import serve
from tests.serve.served import turns
from tests.serve.worldly import NUM_TOKENS, organism, own_answers, samples


def ask(url: str, model: str = "organism@L1") -> str:
    body = {"model": model, "messages": turns(samples()[0]), "max_tokens": NUM_TOKENS}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.loads(reply.read())["choices"][0]["message"]["content"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_when_it_is_ready_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with serve(log=tmp_path / "log") as (process, ready):
        assert ready["models"] == ["organism", *(f"organism@L{layer}" for layer in range(1, 9))]
        assert ready["default_exit"] == 7
        assert ask(ready["url"]) == own_answers(1)[0]
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("chatcmpl-")] == lines[-1:]
    assert " organism@L1 200 21+9 tokens " in lines[-1]


@pytest.mark.slow
def test_a_repaired_model_has_another_name(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    import exitsafe

    base = exitsafe.load_vlm("organism")
    config = LoraConfig(target_modules=base.linear_layers, r=4, init_lora_weights=False)
    get_peft_model(base.model, config).save_pretrained(str(tmp_path / "adapter"))
    adapted = exitsafe.load_vlm("organism", adapter=tmp_path / "adapter")
    with serve("--adapter", str(tmp_path / "adapter"), log=tmp_path / "log") as (_, ready):
        name = ready["models"][0]
        assert name.startswith("organism+")
        assert len(name) == len("organism+01234567")
        assert ready["models"] == list(served_models(adapted))
        [response] = adapted.generate(samples()[:1], 1, max_new_tokens=NUM_TOKENS)
        assert ask(ready["url"], f"{name}@L1") == response.text != own_answers(1)[0]


def test_names_are_those_of_hub_models_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for given, name in (("org/model", "org/model"), (str(folder), "my model"), (".", "my model")):
        monkeypatch.setattr(organism(), "name", given)
        assert list(served_models(organism()))[:2] == [name, f"{name}@L1"]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command fails before it loads anything."""
    assert run(["serve", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port}" in complaint(capsys, "organism", "--port", port)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["organism", "--host", "no such host"], "cannot listen on no such host"),
        (["organism", "--host", "x" * 300], "cannot listen on xxx"),
        (["organism", "--port", "70000"], "--port 70000 must be"),
        (["organism", "--encoder", "audio"], "drop --encoder"),
        (["nowhere/at/all", "--port", "0"], "nowhere/at/all does not exist"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in complaint(capsys, *arguments)


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_what_is_missing_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for loaded in [each for each in sys.modules if each.startswith("exitsafe.serve.app")]:
        monkeypatch.delitem(sys.modules, loaded)
    blocked: Any = None
    monkeypatch.setitem(sys.modules, name, blocked)
    monkeypatch.setitem(sys.modules, f"{name}.applications", blocked)
    assert 'pip install "exitsafe[serve]"' in complaint(capsys, "organism", "--port", "0")


@pytest.mark.slow
def test_beyond_this_machine_it_warns_unless_there_is_a_key(tmp_path: Path) -> None:
    with serve("--host", "0.0.0.0", log=tmp_path / "open") as (_, ready):
        assert ask(ready["url"].replace("0.0.0.0", "127.0.0.1")) == own_answers(1)[0]
    assert "set EXITSAFE_API_KEY to require a key" in (tmp_path / "open").read_text()
    locked = serve("--host", "0.0.0.0", log=tmp_path / "locked", EXITSAFE_API_KEY="k")
    with locked as (_, ready), pytest.raises(urllib.error.HTTPError, match="401"):
        ask(ready["url"].replace("0.0.0.0", "127.0.0.1"))
    assert "warning" not in (tmp_path / "locked").read_text()
