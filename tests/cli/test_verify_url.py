from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitsafe.cli.main import run
from exitsafe.cli.which_exit_words import headline
from exitsafe.engine.vlm import VLM
from exitsafe.exporting.candidates import CLASS_TOKEN, Candidate
from exitsafe.exporting.which_exit import Fit, WhichExit
from tests.cli.conftest import Fail
from tests.exporting.served_model import FakeServer
from tests.judges.chat_server import Answer, ChatServer, serving
from tests.tiny_models import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM(tiny_model("llava"), tiny_processor("llava"), name="tiny")


def test_the_exit_that_was_claimed(vlm: VLM, tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(vlm, Candidate(4)).serving() as url:
        verify = ["verify", f"{url}#m", "--reference", str(tiny_llava)]
        assert run([*verify, "--exit-layer", "4", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["exit_layer"], found["claimed"], found["error_level"]) == (4, 4, 0.01)
        assert [each["exit_layer"] for each in found["candidates"]] == [4] and found["requests"] <= 64
        assert run([*verify, "--exit-layer", "5"]) == 2
    output = capsys.readouterr()
    assert f"{url} runs exit 4, not 5 as claimed (one block short): " in output.out
    assert "is not what was audited: exit 4, not 5 as claimed" in output.err.splitlines()[-1]


def test_what_is_refused(tiny_llava: Path, fail: Fail) -> None:
    url = "http://127.0.0.1:9/v1#m"
    assert "add --reference MODEL" in fail("verify", url)
    assert "--limit applies only to an exported checkpoint" in fail(
        "verify", url, "--reference", tiny_llava, "--limit", "3"
    )
    assert "--reference applies only to the URL" in fail("verify", tiny_llava, "--reference", tiny_llava)
    assert "--exit-layer applies only to the URL" in fail("verify", tiny_llava, "--exit-layer", "3")
    assert "must not contain a user name" in fail("verify", "http://me:secret@h/v1#m", "--reference", tiny_llava)
    assert "could not be reached" in fail("verify", url, "--reference", tiny_llava)


def test_a_server_of_several_models_is_asked_for_one(tiny_llava: Path, fail: Fail) -> None:
    models = {"data": [{"id": f"model-{number}"} for number in range(9)]}
    listed = {"/v1/models": Answer(body=json.dumps(models).encode())}
    with serving(ChatServer(lambda body, number: Answer()), paths=listed) as url:
        line = fail("verify", url, "--reference", tiny_llava)
    assert "serves 9 models" in line and "add #NAME" in line


def _found(**changes: object) -> WhichExit:
    near = Fit(exit_layer=22, fault="", distance=0.02)
    settings: dict[str, object] = {
        "verdict": "established",
        "exit_layer": 22,
        "fault": "",
        "preparation": "",
        "claimed": 23,
        "candidates": (near,),
        "nearest": near,
        "limit": 0.1,
        "deviation": 0.01,
        "differing": (41, 61),
        "requests": 64,
        "decided_after": 9,
        "error_level": 0.01,
        "has_logprobs": True,
        "remarks": (),
    }
    return WhichExit(**(settings | changes))  # type: ignore[arg-type]


def test_what_is_said() -> None:
    differ = "41 of 61 answers differ from the audited model"
    assert headline(_found()) == f"exit 22, not 23 as claimed (one block short): {differ}"
    assert headline(_found(exit_layer=20)) == f"exit 20, not 23 as claimed: {differ}"
    assert headline(_found(exit_layer=23, differing=None)) == "exit 23, as claimed"
    assert headline(_found(claimed=None, differing=None)) == "exit 22"
    assert headline(_found(exit_layer=23, fault=CLASS_TOKEN)) == f"exit 23 with the class token left in: {differ}"
    far = Fit(exit_layer=23, fault="", distance=1.9)
    assert headline(_found(verdict="excluded", exit_layer=None, candidates=(), nearest=far)) == (
        f"no exit of this model: the nearest is exit 23, whose log-probabilities differ by 1.90 on average: {differ}"
    )
    two = (Fit(exit_layer=24, fault="", distance=0.3), Fit(exit_layer=23, fault="", distance=0.2))
    assert headline(_found(verdict="undecided", exit_layer=None, candidates=two, differing=None)) == (
        "exit 23, which cannot be distinguished from exit 24"
    )
