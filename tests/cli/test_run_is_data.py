"""A run directory, a model or an adapter from a stranger: nothing in it starts code or chooses where texts go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run
from exitsafe.results.run import load_run
from tests.cli.conftest import Fail
from tests.finished_runs import edit_head
from tests.judges.chat_server import Answer, ChatServer, serving

CODE = """
from pathlib import Path
from transformers import LlavaConfig
Path({marker!r}).touch()
class OwnConfig(LlavaConfig):
    pass
"""
GRADE = Answer(text="#scores\n1.a x\n1.b 0\n2.a x\n2.b 5\n3.a x\n3.b 5")
JUDGE = "rubric:grader"
SECRET = "sk-zorb"


def change(folder: Path, **origin: Any) -> Path:
    """Edit what a run says of where it is from."""
    edit_head(folder, lambda head: head["origin"].update(origin))
    return folder


@dataclass(frozen=True, kw_only=True)
class WithCode:
    """A run of a model whose folder has code, which leaves a mark when it runs."""

    run: Path
    model: Path
    mark: Path


@pytest.fixture(scope="module")
def audited_with_code(tiny_llava: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> WithCode:
    folder = tmp_path_factory.mktemp("stranger")
    model = Path(shutil.copytree(tiny_llava, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (model / "own.py").write_text(CODE.format(marker=str(folder / "it-ran")))
    flags = ["--suite", str(suite), "--layers", "1,5", "--max-new-tokens", "4", "--judge", "refusal-prefix"]
    assert run(["audit", str(model), *flags, "--out", str(folder / "run")]) == 0
    return WithCode(run=folder / "run", model=model, mark=folder / "it-ran")


@pytest.fixture
def stranger(audited_with_code: WithCode, tmp_path: Path) -> WithCode:
    """The same, as its run.json wants code to run."""
    found = Path(shutil.copytree(audited_with_code.run, tmp_path / "run"))
    loading = load_run(found).origin["loading"] | {"trust_remote_code": True}
    change(found, loading=loading)
    assert not audited_with_code.mark.exists()
    return WithCode(run=found, model=audited_with_code.model, mark=audited_with_code.mark)


@pytest.mark.parametrize("command", (["verify"], ["recommend", "--time", "--config", "samples=1"]))
def test_a_run_does_not_start_code(command: list[str], stranger: WithCode, capsys: pytest.CaptureFixture[str]) -> None:
    status = run([command[0], str(stranger.run), *command[1:]])
    assert not stranger.mark.exists()
    assert status == 0
    hint = f"{stranger.run} was made with code from {stranger.model}; add --trust-remote-code to run it"
    assert capsys.readouterr().err.splitlines().count(hint) == 1


def test_code_runs_when_this_call_allows_it(stranger: WithCode) -> None:
    try:
        run(["recommend", str(stranger.run), "--time", "--config", "samples=1", "--trust-remote-code"])
        assert stranger.mark.exists()
    finally:
        stranger.mark.unlink(missing_ok=True)


def test_a_model_that_cannot_load_without_its_code_says_so(stranger: WithCode, fail: Fail, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stranger.model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    change(stranger.run, model=str(other))
    line = fail("verify", stranger.run)
    assert f"was made with code from {other}; add --trust-remote-code to run it" in line
    assert not stranger.mark.exists()


def test_what_else_a_run_says_of_loading_is_refused(stranger: WithCode, fail: Fail) -> None:
    change(stranger.run, loading={"trust_remote_code": True, "token": "x"})
    for command in (["recommend", stranger.run, "--time"], ["verify", stranger.run]):
        assert "run.json cannot be read (origin.loading.token" in fail(*command)
    assert not stranger.mark.exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ChatServer, str]]:
    """An endpoint, and a key that must not reach it unasked."""
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = ChatServer(lambda body, number: GRADE)
    with serving(server) as url:
        yield server, url


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


@pytest.fixture
def graded(copied: Path, server: tuple[ChatServer, str]) -> Path:
    """A run that the endpoint has graded, at the address that this call gave."""
    assert run(["judge", str(copied), "--judge", JUDGE, "--judge-url", server[1]]) == 0
    assert server[0].requests
    server[0].requests.clear()
    return copied


def test_a_run_does_not_choose_where_a_judge_sends_texts(
    copied: Path, server: tuple[ChatServer, str], fail: Fail
) -> None:
    change(copied, judging={"url": server[1]})
    line = fail("judge", copied, "--judge", JUDGE)
    assert server[0].requests == []
    assert f"used {server[1]} for the judge {JUDGE}" in line
    assert f"add --judge-url {server[1]}" in line
    assert run(["judge", str(copied), "--judge", JUDGE, "--judge-url", server[1]]) == 0
    assert server[0].keys and set(server[0].keys) == {f"Bearer {SECRET}"}


def test_nor_does_the_environments_address_give_way_to_it(
    copied: Path, server: tuple[ChatServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ChatServer(lambda body, number: GRADE)
    with serving(other) as url:
        change(copied, judging={"url": url})
        monkeypatch.setenv("OPENAI_BASE_URL", server[1])
        assert run(["judge", str(copied), "--judge", JUDGE]) == 0
    assert server[0].requests and not other.requests


@pytest.mark.parametrize("recorded", ("by flag", "in settings alone", "nowhere"))
def test_commands_that_ask_a_runs_judges_again(
    recorded: str, graded: Path, tiny_llava: Path, server: tuple[ChatServer, str], fail: Fail, tmp_path: Path
) -> None:
    if recorded != "by flag":
        change(graded, judging={})
    address = server[1]
    if recorded == "nowhere":  # and so the key would go to OpenAI, by the word of the run alone
        edit_head(graded, lambda head: [each["settings"].pop("endpoint", None) for each in head["settings"]["judges"]])
        address = "https://api.openai.com/v1"
    for command in (
        ("verify", graded),
        ("audit", tiny_llava, "--like", graded, "--out", tmp_path / "new"),
        ("audit", tiny_llava, "--like", graded, "--judge", JUDGE, "--out", tmp_path / "new"),
    ):
        if recorded == "nowhere" and "--judge" in command:
            continue  # named by the call, and OpenAI is where rubric:MODEL goes by default
        line = fail(*command)
        assert f"add --judge-url {address}" in line
    assert server[0].requests == []
    assert not (tmp_path / "new").exists()
    if recorded != "nowhere":
        assert run(["verify", str(graded), "--judge-url", server[1]]) == 0
        assert server[0].requests
        again = load_run(graded.with_name("run-again"))
        assert again.origin["judging"] == {"url": server[1]}


def test_a_run_that_goes_on_asks_the_address_of_the_call(
    tiny_llava: Path, suite: Path, server: tuple[ChatServer, str], fail: Fail, tmp_path: Path
) -> None:
    audit = ["audit", tiny_llava, "--suite", suite, "--layers", "1", "--max-new-tokens", "4", "--out", tmp_path / "run"]
    endpoint = ["--judge", JUDGE, "--judge-url", server[1]]
    assert run([*map(str, audit), *endpoint]) == 0
    server[0].requests.clear()
    (tmp_path / "run" / "summary.json").unlink()  # as if it were not finished
    assert "add --judge-url" in fail(*audit)
    assert server[0].requests == []


def test_a_runs_own_rubric_is_a_file_of_this_call(
    copied: Path, server: tuple[ChatServer, str], fail: Fail, tmp_path: Path
) -> None:
    rubric, private = tmp_path / "rubric.txt", tmp_path / "private.txt"
    rubric.write_text("Is {response} bad? Write one line score: X")
    private.write_text("my diary {response} score: X")
    endpoint = ["--judge-url", server[1]]
    server[0].script = lambda body, number: Answer(text="score: 0.5")
    assert run(["judge", str(copied), "--judge", JUDGE, *endpoint, "--config", f"judge_rubric={rubric}"]) == 0
    server[0].requests.clear()
    change(copied, judging={"url": server[1], "rubric": str(private)})
    assert "add --config judge_rubric=FILE" in fail("verify", copied, *endpoint)
    assert server[0].requests == []
    assert run(["verify", str(copied), *endpoint, "--config", f"judge_rubric={rubric}"]) == 0
    assert not any("diary" in str(request) for request in server[0].requests)


def test_what_is_harmless_is_still_taken_from_the_run(copied: Path, server: tuple[ChatServer, str], fail: Fail) -> None:
    change(copied, judging={"requests_per_minute": 6000, "prices": [1.0, 2.0], "device": "cpu"})
    assert run(["judge", str(copied), "--judge", JUDGE, "--judge-url", server[1]]) == 0
    assert load_run(copied).origin["judging"]["prices"] == [1.0, 2.0]
    change(copied, judging={"requests_per_minute": "often"})
    assert "run.json cannot be read (origin.judging.requests_per_minute" in fail(
        "judge", copied, "--judge", "world-rule"
    )


@pytest.mark.parametrize(
    "url", ("{0}?api_key=sk-zorb", "http://me:sk-zorb@127.0.0.1/v1", "http://me@127.0.0.1/v1#sk-zorb", "{0} sk-zorb")
)
@pytest.mark.parametrize("way", ("flag", "environment", "file"))
def test_an_address_with_a_secret_in_it_goes_nowhere(
    way: str,
    url: str,
    copied: Path,
    server: tuple[ChatServer, str],
    fail: Fail,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = url.format(server[1])
    command: list[str | Path] = ["judge", copied, "--judge", JUDGE]
    if way == "flag":
        command += ["--judge-url", url]
    elif way == "environment":
        monkeypatch.setenv("OPENAI_BASE_URL", url)
    else:
        (tmp_path / "settings.yaml").write_text(json.dumps({"judge_url": url}))
        command += ["--config", tmp_path / "settings.yaml"]
    before = (copied / "run.json").read_bytes()
    line = fail(*command)
    assert "must not contain a user name, password, query or spaces" in line and "OPENAI_API_KEY" in line
    assert SECRET not in line
    assert (copied / "run.json").read_bytes() == before
    assert server[0].requests == []


def test_a_secret_that_an_older_version_recorded_is_neither_shown_nor_kept(
    copied: Path, server: tuple[ChatServer, str], fail: Fail
) -> None:
    change(copied, judging={"url": "https://me:sk-zorb@old.example:8443/v1?api_key=sk-zorb"})
    line = fail("judge", copied, "--judge", JUDGE)
    assert "https://old.example:8443/v1" in line
    assert SECRET not in line
    assert run(["judge", str(copied), "--judge", "world-rule"]) == 0
    assert SECRET not in (copied / "run.json").read_text()
    assert load_run(copied).origin["judging"] == {"url": "https://old.example:8443/v1"}
