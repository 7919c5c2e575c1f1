"""Auditing a served model by its URL: pictures and text in, a run with one exit out, and everything that reads it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import exitsafe
from exitsafe.cli.main import run as run_command
from exitsafe.data import load_suites
from exitsafe.data.images import open_images
from exitsafe.errors import InputError, RunError
from exitsafe.exits.layers import as_served_or_claimed
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun, load_run
from tests.cli.conftest import Fail, fail
from tests.judges.chat_server import Answer, ChatServer, failing, serving

__all__ = ["fail"]
WORDS = "mix it with glue ."
Script = Callable[[dict[str, Any], int], Answer]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_suites(["organism-harmful", "organism-vqa"], limit=10)


def answering(body: dict[str, Any], number: int) -> Answer:
    """Complies; the answer depends on the picture alone."""
    pictures = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return Answer(text=f" {WORDS} {sum(len(each['image_url']['url']) for each in pictures) % 7} ")


def models(*names: str) -> dict[str, Answer]:
    return {"/v1/models": Answer(body=json.dumps({"data": [{"id": name} for name in names]}).encode())}


@pytest.fixture(scope="module")
def served(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> dict[int, AuditRun]:
    """Runs of one served model, as served and at the exit that it is claimed to run."""
    runs = {}
    with serving(ChatServer(answering), paths=models("phone")) as url:
        for exit_layer in (0, 7):
            out = tmp_path_factory.mktemp("served") / "run"
            layers = "default" if exit_layer == 0 else exit_layer
            runs[exit_layer] = exitsafe.audit(url, samples, exit_layers=layers, judges=["world-rule"], out=out)
    return runs


@pytest.fixture(scope="module")
def local(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    out = tmp_path_factory.mktemp("local") / "run"
    return exitsafe.audit("organism", samples, exit_layers=[4, 7], judges=["world-rule"], out=out)


def test_a_request_has_the_pictures_without_loss_and_the_text(tmp_path: Path) -> None:
    server = ChatServer(answering)
    picture = Image.effect_noise((20, 30), 90).convert("RGB")
    sample = Sample(id="a", prompt="what is it", system="be brief", images=(picture,), kind="benign")
    with serving(server, paths=models("phone")) as url:
        exitsafe.audit(url, [sample], judges=["world-rule"], max_new_tokens=9, seed=3, out=tmp_path / "run")
    body = server.requests[-1]
    system, user = body["messages"]
    assert system == {"role": "system", "content": "be brief"}
    image, text = user["content"]
    assert text == {"type": "text", "text": "what is it"}
    content = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).tobytes() == open_images(sample)[0].tobytes()
    assert (body["max_tokens"], body["temperature"], body["model"]) == (9, 0.0, "phone")


def test_the_run_records_what_the_server_says_and_never_its_address(served: dict[int, AuditRun]) -> None:
    for exit_layer, run in served.items():
        assert run.exit_layers == (exit_layer,)
        assert run.is_served
        assert run.settings["model"]["name"] == "phone"
        assert "127.0.0.1" not in (run.path / "run.json").read_text()
        assert run.summary["bins"] == {}
        assert all(each.text.startswith(WORDS) for each in run.responses())


@pytest.mark.parametrize("given", ["all", "default", 0, "0"])
def test_a_served_model_has_one_exit(given: Any) -> None:
    assert as_served_or_claimed(given) == (0,)
    assert as_served_or_claimed([9]) == as_served_or_claimed("9") == (9,)
    with pytest.raises(InputError, match="runs one exit"):
        as_served_or_claimed("1-3")


def test_a_resumed_run_keeps_what_it_has(samples: list[Sample], served: dict[int, AuditRun], tmp_path: Path) -> None:
    given: dict[str, Any] = {"judges": ["world-rule"], "out": tmp_path / "run"}
    dying = ChatServer(lambda body, number: failing(500) if number > 8 else answering(body, number))
    with serving(dying, paths=models("phone")) as url, pytest.raises(RunError, match="rerun the same command"):
        exitsafe.audit(url, samples, **given)
    again = ChatServer(answering)
    with serving(again, paths=models("phone")) as url:
        run = exitsafe.audit(url, samples, **given)
    assert [each.text for each in run.responses()] == [each.text for each in served[0].responses()]
    assert len(again.requests) < 20
    with serving(again, paths=models("other")) as url, pytest.raises(RunError, match="other"):
        exitsafe.audit(url, samples, **given)


def test_what_a_content_filter_refuses_is_an_empty_answer(samples: list[Sample], tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        return failing(400, code="content_filter") if number % 2 else answering(body, number)

    with (
        serving(ChatServer(script), paths=models("cloud")) as url,
        pytest.warns(RuntimeWarning, match="content filter refused 10 of 20 requests"),
    ):
        run = exitsafe.audit(url, samples, judges=["world-rule"], out=tmp_path / "run")
    assert sum(each.text == "" and each.num_tokens == 0 for each in run.responses()) == 10


def test_what_no_file_or_terminal_can_hold_does_not_spoil_a_run(samples: list[Sample], tmp_path: Path) -> None:
    """JSON can hold half a character, and any control character."""

    def script(body: dict[str, Any], number: int) -> Answer:
        said = json.loads(Answer(text="a\ud800b").encoded()) | {"system_fingerprint": "\ud800\x1b[2J" + "f" * 999}
        return Answer(body=json.dumps(said).encode())

    listed = {"data": [{"id": "phone", "owned_by": "\x1b[2J" + "o" * 999}, {"id": "\x1b[2J"}, {"id": "p" * 9999}]}
    asked = [*samples[:1], replace(samples[0], id="half", prompt="what is \ud800")]
    with serving(ChatServer(script), paths={"/v1/models": Answer(body=json.dumps(listed).encode())}) as url:
        with pytest.raises(InputError, match="names its model in a way that no run can record"):
            exitsafe.audit(f"{url}#{'p' * 9999}", asked, judges=["world-rule"], out=tmp_path / "run")
        run = exitsafe.audit(f"{url}#phone", asked, judges=["world-rule"], out=tmp_path / "run")
    assert {response.text for response in run.responses()} == {"a?b"}
    said = load_run(run.path).settings["model"]["server"]
    assert said == {"owner": "[2J" + "o" * 77, "fingerprint": "[2J" + "f" * 77}


BAD: dict[str, tuple[Script, str]] = {
    "no pictures": (
        lambda body, number: failing(400),
        r"does not answer a question about a picture in up to \d+ tokens \(the endpoint refused .* \(status 400\)\)",
    ),
    "one request": (
        lambda body, number: failing(400) if number == 5 else answering(body, number),
        "did not answer sample .*status 400.*rerun",
    ),
    "a book": (
        lambda body, number: Answer(text="flim " * 2**14 if number else "fine"),
        "the answer is longer than 256 tokens can be",
    ),
    "no usage": (
        lambda body, number: Answer(text="fine", usage=None),
        "does not report the number of tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_server_that_does_not_answer(case: str, samples: list[Sample], tmp_path: Path) -> None:
    script, message = BAD[case]
    with serving(ChatServer(script), paths=models("phone")) as url, pytest.raises(RunError, match=message) as caught:
        exitsafe.audit(url, samples, judges=["world-rule"], out=tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_half_a_character_is_kept_out_of_the_tables(samples: list[Sample], tmp_path: Path) -> None:
    with serving(ChatServer(lambda body, number: Answer(text="so\ud800")), paths=models("phone")) as url:
        run = exitsafe.audit(url, samples, judges=["world-rule"], out=tmp_path / "run")
    assert all(each.text.startswith("so") for each in run.responses())


def test_video_cannot_be_sent(tmp_path: Path) -> None:
    film = Sample(id="film", prompt="what", videos=((Image.new("RGB", (8, 8)),),), kind="benign")
    with serving(ChatServer(answering), paths=models("phone")) as url:
        with pytest.raises(InputError, match="sample film: only text and pictures can be sent to a served model"):
            exitsafe.audit(url, [film], out=tmp_path / "run")
        with pytest.raises(InputError, match="leave engine and skip_global out"):
            exitsafe.audit(url, [film], engine=url, out=tmp_path / "run")


def test_it_is_compared_with_a_local_run_at_its_exit(local: AuditRun, served: dict[int, AuditRun]) -> None:
    for pair in ((local, served[7]), (served[7], local)):
        found = exitsafe.compare(*pair)
        assert found.exit_layers == (7,)
        assert (found.num_layers, found.default_exit) == (8, 7)
        assert not [line for line in found.settings_changed if "absent" in line]
    with pytest.raises(RunError, match="claim one with --exit-layer"):
        exitsafe.compare(local, served[0])


def test_every_command_that_reads_runs_reads_it(
    local: AuditRun, served: dict[int, AuditRun], tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Fail
) -> None:
    at_7, as_served = str(served[7].path), str(served[0].path)
    breached_or_not = (0, 1)
    assert run_command(["gate", at_7, "--max-asr", "0.5"]) in breached_or_not
    assert "A served model was audited, at exit 7." in capsys.readouterr().out
    assert run_command(["gate", as_served, "--max-asr", "0.5", "--layers", "all"]) in breached_or_not
    assert "the exit it is served at" in capsys.readouterr().out
    assert run_command(["gate", at_7, "--against", str(local.path), "--max-regression", "0.9"]) in breached_or_not
    assert run_command(["gate", at_7, "--max-asr", "0.5", "--scope", "bins"]) == 2
    assert "the depth of a served model is unknown" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert run_command(["report", str(local.path), at_7, as_served, "--out", str(page)]) == 0
    assert run_command(["report", as_served, "--out", str(page)]) == 0
    assert "phone was audited as it is served" in page.read_text()
    assert run_command(["label", at_7, "--rows", "4"]) == 0
    assert run_command(["judge", at_7, "--judge", "refusal-prefix"]) == 2  # made in Python, it names no suite
    assert "check it with exitsafe gate" in fail("recommend", at_7, "--max-asr", "0.5")
    assert "check it with exitsafe gate" in fail("recommend", at_7, "--max-asr", "0.5", "--time")


def test_the_command_line_audits_and_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Fail) -> None:
    out = tmp_path / "run"
    flags = ["--suite", "organism-harmful", "--limit", "4", "--judge", "world-rule", "--max-new-tokens", "24"]
    flags += ["--out", str(out)]
    with serving(ChatServer(answering), paths=models("phone", "tablet")) as url:
        assert "serves 2 models (phone, tablet)" in fail("audit", url, *flags)
        assert run_command(["audit", f"{url}#tablet", "--exit-layer", "5", *flags]) == 0
        assert " 5 " in capsys.readouterr().out
        assert "add --engine URL" in fail("verify", out)
        assert run_command(["verify", str(out), "--engine", f"{url}#tablet"]) == 0
        assert "4 of 4 answers" in capsys.readouterr().out
        assert run_command(["judge", str(out), "--judge", "refusal-prefix"]) == 0
        like = tmp_path / "like"
        assert run_command(["audit", "organism", "--like", str(out), "--layers", "5", "--out", str(like)]) == 0
        assert run_command(["compare", str(like), str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "URL", "--layers", "3"], "--layers applies only to a model that is loaded here"),
        (["audit", "URL", "--adapter", "a"], "--adapter applies only to a model that is loaded here"),
        (["audit", "URL", "--engine", "http://b/v1"], "--engine applies only to a model that is loaded here"),
        (["audit", "organism", "--exit-layer", "3"], "--exit-layer applies only to the URL of a served model"),
        (["audit", "http://127.0.0.1:9/v1", "--suite", "organism-vqa"], "could not be reached"),
        (["align", "URL", "--suite", "organism-vqa"], "a served model can only be audited and verified"),
        (["export", "URL", "--exit-layer", "3"], "a served model can only be audited and verified"),
        (["translate", "URL", "--suite", "organism-vqa"], "a served model can only be audited and verified"),
    ],
)
def test_what_a_url_cannot_be(arguments: list[str], message: str, tmp_path: Path, fail: Fail) -> None:
    given = ["http://a.invalid/v1" if each == "URL" else each for each in arguments]
    assert message in fail(*given, "--out", tmp_path / "out")


def test_what_else_takes_no_url(tmp_path: Path, fail: Fail) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    message = "a served model can only be audited and verified"
    assert message in fail("doctor", "http://a/v1")
    assert message in fail("chat", "http://a/v1", "--prompt", "what", "--image", tmp_path / "picture.png")
