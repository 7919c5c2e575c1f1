from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig
from typer.testing import CliRunner

from exitsafe.cli.doctor_command import ASSUMED_SAMPLES, doctor_command
from exitsafe.cli.doctor_tables import readable
from exitsafe.doctor import bytes_by_name
from exitsafe.errors import InputError, ModelError
from exitsafe.judges.qwen3guard import DEFAULT_MODEL
from tests.doctor.test_judge_weights import reward_model  # noqa: F401


def examine(*arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(doctor_command)
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0
    return outcome.stdout


def document(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(examine(*arguments, "--json"))
    return found


def test_tables_and_notes(tiny_llava: Path) -> None:
    output = examine(tiny_llava)
    assert "supported" in output
    for words in ("llava, encoder clip_vision_model", "1 to 6; the untouched model reads 5", "Memory of audit"):
        assert words in output
    for part in ("optimiser", "trained weights", "feature cache", "rows under generation", "judge beside", "peak"):
        assert part in output
    assert "Early exit" in output
    assert max(map(len, output.splitlines())) < 250


def test_the_document(tiny_llava: Path, suite: Path) -> None:
    found = document(tiny_llava, "--suite", suite, "--device", "cpu")
    assert (found["family"], found["num_layers"], found["default_exit"]) == ("llava", 6, 5)
    assert found["processor"] is True and found["chat_template"] is True
    assert found["samples"] == {"number": 8, "measured": True}
    assert found["prompt_tokens"]["measured"] is True
    assert found["judge"].startswith("qwen3guard:")
    assert found["audit"]["fits"] is True
    assert found["audit"]["peak"] < found["device"]["free_bytes"]
    assert sum(part["bytes"] for part in found["align"]["device"]) >= found["align"]["peak"]
    work = found["compute"]
    first_token = work["encoder"] + work["prefill"]
    assert work["encoder_share"] == work["encoder"] / first_token
    all_blocks = (work["encoder"] - work["encoder_at_first_exit"]) / first_token
    assert work["saved_per_block"] == pytest.approx(all_blocks / 4) and all_blocks > work["saved_at_most"] > 0


def test_without_a_suite_the_number_of_samples_is_assumed(tiny_llava: Path) -> None:
    assert document(tiny_llava)["samples"] == {"number": ASSUMED_SAMPLES, "measured": False}
    few, many = (document(tiny_llava, "--samples", number)["align"]["host"][0]["bytes"] for number in ("10", "30"))
    assert many == 3 * few > 0


def test_settings_of_align_from_a_file(tiny_llava: Path, tmp_path: Path) -> None:
    settings = tmp_path / "lppo.yaml"
    settings.write_text("lppo:\n  lora_rank: 32\n  gradient_checkpointing: true\n")
    plain, changed = document(tiny_llava)["align"], document(tiny_llava, "--config", settings)["align"]
    assert _bytes(changed, "trained weights") == 2 * _bytes(plain, "trained weights")
    assert _bytes(changed, "activations") < _bytes(plain, "activations")
    with pytest.raises(InputError, match="lora_rank=0 must be"):
        settings.write_text("lora_rank: 0\n")
        examine(tiny_llava, "--config", settings)


def test_models_of_reward_and_watch_are_counted(
    tiny_llava: Path,
    reward_model: tuple[Path, int],  # noqa: F811
) -> None:
    folder, size = reward_model
    judge = f"reward:{folder}"
    found = document(tiny_llava, "--reward", judge, "--watch-judge", judge, "--device", "cpu")["align"]
    assert _bytes(found, "reward models") == _bytes(found, "the watch's judge") == size
    assert {part["name"] for part in found["host"]} == {"feature cache", "best weights", "checkpoint"}


def test_the_guard_of_the_built_in_reward_is_counted_where_it_is_needed(tiny_llava: Path) -> None:
    guard = bytes_by_name(DEFAULT_MODEL)
    for rewards, expected in (
        ([], guard),
        (["vqa"], guard),  # which measures no refusals
        (["refusal-prefix"], 0),
        (["refusal-prefix=0.5", "built-in"], guard),
    ):
        flags = [word for reward in rewards for word in ("--reward", reward)]
        assert _bytes(document(tiny_llava, *flags, "--device", "cpu")["align"], "reward models") == expected
    assert not any(part["name"] == "reward models" for part in document("organism")["align"]["device"])


def test_an_organism_needs_nothing_more() -> None:
    found = document("organism")
    assert found["judge"] is None and found["samples"]["measured"] is True
    assert (found["num_layers"], found["default_exit"]) == (8, 7)
    assert not any("no processor" in note for note in found["notes"])


def test_notes_on_what_a_user_would_run_into(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llava / "config.json").read_bytes())
    notes = " ".join(document(tmp_path, "--dtype", "float16")["notes"])
    assert "give --dtype bfloat16" in notes
    assert "There is no processor" in notes


def test_an_unsupported_family_is_one_line(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model type 'llama' .* is not supported"):
        examine(tmp_path)


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (5 * 2**40, "5.0 TiB")]
)
def test_units(size: int, text: str) -> None:
    assert readable(size) == text


def _bytes(plan: dict[str, Any], name: str) -> int:
    return next((int(part["bytes"]) for part in plan["device"] if part["name"] == name), 0)
