from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig
from typer.testing import CliRunner

from exitsafe.cli.console import readable
from exitsafe.cli.doctor_command import doctor_command
from exitsafe.cli.flags import as_command
from exitsafe.doctor import bytes_by_name
from exitsafe.errors import InputError, ModelError
from exitsafe.judges.qwen3guard import QWEN3GUARD


def examine(*arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(as_command(doctor_command))
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0
    return outcome.stdout


def document(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(examine(*arguments, "--json"))
    return found


def test_tables_and_notes(tiny_llava: Path) -> None:
    output = examine(tiny_llava)
    for words in ("supported", "llava, encoder clip_vision_model", "1 to 6; the untouched model reads 5", "Early exit"):
        assert words in output
    for part in ("image encoder", "language model", "judge beside it", "cache", "free", "an audit begins with"):
        assert part in output
    assert max(map(len, output.replace(str(tiny_llava), "MODEL").splitlines())) < 280


def test_the_document(tiny_llava: Path, suite: Path) -> None:
    found = document(tiny_llava, "--suite", suite, "--device", "cpu")
    assert (found["family"], found["num_layers"], found["default_exit"]) == ("llava", 6, 5)
    assert found["chat_template"] is True
    assert found["prompt_tokens"]["measured"] is True
    assert found["judge"].startswith("qwen3guard:")
    memory = found["memory"]
    assert memory["judge_bytes"] == bytes_by_name(QWEN3GUARD.model)
    assert memory["num_tokens"] == found["prompt_tokens"]["longest"] + 256
    assert memory["free_bytes"] > sum(memory["weights"].values()) > 0 < memory["rows"]
    work = found["compute"]
    first_token = work["encoder"] + work["prefill"]
    assert work["encoder_share"] == work["encoder"] / first_token
    all_blocks = (work["encoder"] - work["encoder_at_first_exit"]) / first_token
    assert work["saved_per_block"] == pytest.approx(all_blocks / 4) and all_blocks > work["saved_at_most"] > 0


def test_weights_that_do_not_fit_are_said(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.machine.memory.free_memory", lambda device: 2**20)
    found = document(tiny_llava)
    assert found["memory"]["rows"] == 0
    assert any("do not fit in the 1.0 MiB that are free: use a smaller --dtype" in note for note in found["notes"])


def test_a_gpu_that_is_not_there_is_one_line(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="device 'cuda:9': torch sees 0 GPUs here; choose auto or cpu"):
        examine(tiny_llava, "--device", "cuda:9")


def test_an_organism_needs_nothing_more() -> None:
    found = document("organism")
    assert found["judge"] is None and found["prompt_tokens"]["measured"] is True
    assert (found["num_layers"], found["default_exit"]) == (8, 7)


def test_notes_on_what_a_user_would_run_into(tiny_llava: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llava, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    notes = " ".join(document(tmp_path / "model", "--dtype", "float16")["notes"])
    assert "use --dtype bfloat16" in notes
    assert "has no chat template: prompts are written as pictures, then text" in notes
    (tmp_path / "config.json").write_bytes((tiny_llava / "config.json").read_bytes())
    with pytest.raises(ModelError, match="has no processor: copy the processor and tokenizer files next to the"):
        examine(tmp_path)


def test_an_unsupported_family_is_one_line(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot read the config of .*LlamaConfig"):
        examine(tmp_path)


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (5 * 2**40, "5.0 TiB")]
)
def test_units(size: int, text: str) -> None:
    assert readable(size) == text
