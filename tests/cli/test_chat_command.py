from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import exitsafe
from exitsafe.cli import chat_command
from exitsafe.cli.chat_command import SideBySide
from exitsafe.cli.console import printable, screen
from exitsafe.cli.main import run
from exitsafe.data import load_suites
from exitsafe.records import Sample
from tests.tiny_models import noise_image

HOSTILE = "\x1b[2J[red]x[/red]\x07\u202egnp.exe\r\x9b31m\u2028:smile:\x00<script>"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "picture.png"
    (sample,) = load_suites(["organism-harmful"], limit=1)
    sample.images[0].save(path)  # type: ignore[union-attr]
    return path


def _says(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_one_prompt_at_several_exits_is_what_generate_says(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (asked,) = load_suites(["organism-harmful"], limit=1)
    flags = ("--image", str(picture), "--layers", "1,4", "--prompt", asked.prompt, "--json")
    assert run(["chat", "organism", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    sample = Sample(id="any", prompt=asked.prompt, images=(picture,), kind="harmful")
    expected = exitsafe.load_vlm("organism").generate([sample] * 3, [1, 4, 7], max_new_tokens=24)
    assert [(each["exit_layer"], each["text"]) for each in document["answers"]] == [
        (each.exit_layer, each.text) for each in expected
    ]
    assert [each["differs_from_default"] for each in document["answers"]] == [True, True, False]
    assert document["default_exit"] == 7


def test_prompts_line_by_line_until_exit(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _says(monkeypatch, "what is this ?", "", "a <image> b", "what is this ?", "exit", "what is this ?")
    assert run(["chat", "organism", "--image", str(picture)]) == 2  # one of them could not be asked
    output = capsys.readouterr()
    assert output.out.count("exit 2, same") == 2  # the last early and the last middle exit, and the default
    assert output.out.count("exit 5, same") == 2
    assert output.out.count("exit 7, default") == 2
    notice, complaint = output.err.splitlines()
    assert notice == "Answers are unfiltered: whatever the model says is shown. Nothing is saved."
    assert "placeholder '<image>'" in complaint


def test_draws_are_not_compared(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--image", str(picture), "--prompt", "what is this ?", "--temperature", "1.5", "--seed", "3")
    assert run(["chat", "organism", *flags, "--max-new-tokens", "1"]) == 0
    output = capsys.readouterr().out
    assert "differs" not in output and "same" not in output
    assert "exit 2, cut off" in output


@pytest.mark.parametrize("width", [40, 120])
def test_answers_are_hostile_text_on_any_terminal(width: int) -> None:
    file = io.StringIO()
    screen(file, width=width).print(SideBySide(titles=["exit 1", "exit 7, default"], texts=[HOSTILE, "fine"]))
    text = file.getvalue()
    for character in "\x1b\x07\u202e\r\x9b\u2028\x00":
        assert character not in text
    assert "[red]x[/red]" in text
    assert ":smile:" in text
    assert "<script>" in text.replace("\n", "")
    assert all(len(line) <= width for line in text.splitlines())
    assert ("┏" in text) == (width == 120)  # side by side in a table, one below the other in panels


def test_joiners_and_wide_spaces_stay_readable() -> None:
    assert printable("می\u200cروم\u00a0x\u3000y") == "می\u200cروم x y"


def test_the_whole_way_of_a_hostile_answer(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exitsafe.engine.reader.Reader.decode", lambda self, token_ids: HOSTILE)
    for flags in ([], ["--json"]):
        assert run(["chat", "organism", "--image", str(picture), "--prompt", "what is this ?", *flags]) == 0
        output = capsys.readouterr()
        for character in "\x1b\x07\u202e\x9b\u2028\x00":
            assert character not in output.out + output.err


def test_nothing_is_saved(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(picture.parent.iterdir())
    assert run(["chat", "organism", "--image", str(picture), "--prompt", "what is this ?"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert sorted(picture.parent.iterdir()) == before


def test_families_without_a_rule_of_the_world(tiny_llava: Path, tmp_path: Path, capsys: Any) -> None:
    noise_image(1).save(tmp_path / "f.png")
    flags = ("--image", str(tmp_path / "f.png"), "--prompt", "what colour is the shape", "--max-new-tokens", "4")
    assert run(["chat", str(tiny_llava), *flags, "--layers", "all", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [each["exit_layer"] for each in answers] == list(range(1, 1 + len(answers)))
    assert len(answers) > 3


def test_what_is_refused_before_a_model_is_loaded(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    monkeypatch.setattr("exitsafe.cli.models.load_model", lambda *args, **settings: pytest.fail("loaded"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert "give --image FILE" in fail("chat", "organism", "--prompt", "x")
    assert "--json is for one prompt" in fail("chat", "organism", "--image", picture, "--json")
    assert "nowhere.png does not exist" in fail("chat", "organism", "--image", tmp_path / "nowhere.png")
    assert "cannot be read" in fail("chat", "organism", "--image", broken)


def test_a_wrong_exit_or_prompt_is_refused(picture: Path, fail: Any) -> None:
    line = fail("chat", "organism", "--image", picture, "--prompt", "x", "--layers", "9")
    assert "choose 1 to 8" in line
    assert "the placeholder" in fail("chat", "organism", "--image", picture, "--prompt", "a <image> b")


def test_on_a_terminal_end_of_input_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["first", " ", "second"])

    def read(shown: str) -> str:
        assert shown == "> "
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    assert list(chat_command._lines()) == ["first", "second"]
