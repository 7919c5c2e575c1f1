from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exitsafe
from exitsafe.cli.main import run
from exitsafe.engine.load import load_vlm
from exitsafe.exporting.manifest import MANIFEST, hash_each
from tests.cli.conftest import Fail
from tests.exporting.slim_models import save_adapter
from tests.finished_runs import edit_head
from tests.judges.chat_server import Answer, ChatServer, serving


@pytest.fixture(scope="module")
def exported(tiny_llava: Path, audited: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exitsafe.export(tiny_llava, exit_layer=2, out=tmp_path_factory.mktemp("export") / "slim")


@pytest.fixture
def slim(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "slim"))


def _verify(*arguments: str | Path, status: int = 0, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert run(["verify", *map(str, arguments), "--json"]) == status
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_what_was_exported_is_what_was_audited(slim: Path, audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slim / "README.md").write_text("completed by hand")
    found, _ = _verify(slim, "--against", audited, capsys=capsys)
    assert (found["exit_layer"], found["answers"], found["answers_same"]) == (2, 8, 8)
    assert found["verdicts"]["refusal-prefix refusal"] == 8
    assert found["verdicts_changed"] == {}
    assert found["otherwise"] == []
    assert _verify(slim, "--against", audited, "--limit", "3", capsys=capsys)[0]["answers"] == 3
    assert run(["verify", str(slim), "--against", str(audited)]) == 0
    assert "8 of 8 answers at exit 2 are those of the audit" in capsys.readouterr().out


def test_changed_missing_and_added_files(slim: Path, audited: Path, fail: Fail) -> None:
    verify = ["verify", slim, "--against", audited]
    _tamper(slim / "model.safetensors", amount=1e-3)
    assert "is not as it was exported (changed: model.safetensors)" in fail(*verify)
    (slim / "adapter_config.json").write_text("{}")  # stock transformers would put an adapter on the model
    (slim / "generation_config.json").unlink()
    line = fail(*verify)
    assert "missing: generation_config.json; not exported: adapter_config.json" in line


def test_a_tampered_weight_shows_in_the_answers_when_its_hash_was_forged(
    slim: Path, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _tamper(slim / "model.safetensors", amount=2.0)
    _forge(slim)
    found, errors = _verify(slim, "--against", audited, status=2, capsys=capsys)
    differ = found["answers"] - found["answers_same"]
    assert differ > 0
    assert (
        f"{differ} of 8 answers and {sum(found['verdicts_changed'].values())} verdicts differ"
        in errors.splitlines()[-1]
    )
    shown = json.dumps(found) + errors
    assert not [r.text for r in exitsafe.load_run(audited).responses() if len(r.text.split()) > 1 and r.text in shown]
    found, _ = _verify(slim, "--against", audited, "--tolerance", "1", capsys=capsys)
    assert found["answers"] - found["answers_same"] == differ


def test_another_exit_under_a_forged_record(
    slim: Path, audited: Path, tiny_llava: Path, tmp_path: Path, fail: Fail
) -> None:
    other = exitsafe.export(load_vlm(tiny_llava), exit_layer=5, out=tmp_path / "other")
    _forge(other, exit_layer=2)
    assert "has 5 encoder blocks, but was exported with 2" in fail("verify", other, "--against", audited)


@pytest.mark.parametrize("flags", (["--dtype", "bfloat16"], ["--quantization", "int8"]))
def test_as_it_will_be_served(flags: list[str], slim: Path, audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "int8" in flags:
        pytest.importorskip("bitsandbytes", reason="needs exitsafe[quantization]")
    found, _ = _verify(slim, "--against", audited, *flags, "--tolerance", "1", capsys=capsys)
    assert any(("dtype" in line or "quantization" in line) for line in found["otherwise"])
    assert found["answers"] == 8


@pytest.mark.parametrize("keep_adapter", (False, True))
def test_with_an_adapter(
    keep_adapter: bool,
    tiny_llava: Path,
    suite: Path,
    audited: Path,
    tmp_path: Path,
    fail: Fail,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_adapter(tiny_llava, tmp_path / "adapter")
    after = tmp_path / "after"
    assert run(["audit", str(tiny_llava), "--adapter", str(adapter), "--like", str(audited), "--out", str(after)]) == 0
    vlm = load_vlm(tiny_llava, adapter=adapter)
    out = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim", keep_adapter=keep_adapter, audit=after)
    found, _ = _verify(out, "--against", after, capsys=capsys)
    assert found["answers_same"] == 8
    assert "is not an audit of the model that" in fail("verify", out, "--against", audited)


def test_a_judge_behind_an_address_of_the_run_is_left_out(
    slim: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(audited, tmp_path / "run"))
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    grade = "#scores\n1.a x\n1.b 0\n2.a x\n2.b 5\n3.a x\n3.b 5"
    with serving(ChatServer(lambda body, number: Answer(text=grade))) as url:
        assert run(["judge", str(copied), "--judge", "rubric:m", "--judge-url", url]) == 0
    _tamper(slim / "model.safetensors", amount=2.0)
    _forge(slim)
    found, errors = _verify(slim, "--against", copied, "--tolerance", "1", capsys=capsys)
    assert found["answers_same"] < found["answers"]  # judges are asked only where answers differ
    assert "rubric:m was skipped" in errors and f"add --judge-url {url}" in errors


def test_what_cannot_be_verified(slim: Path, audited: Path, tiny_llava: Path, tmp_path: Path, fail: Fail) -> None:
    assert "has no exitsafe.json: give a folder that exitsafe export wrote" in fail(
        "verify", tiny_llava, "--against", audited
    )
    assert "--encoder is recorded with the run" in fail("verify", slim, "--against", audited, "--encoder", "audio")
    other = exitsafe.export(load_vlm(tiny_llava), exit_layer=3, out=tmp_path / "other")
    assert "has no exit layer 3, only 1, 2, 5" in fail("verify", other, "--against", audited)
    copied = Path(shutil.copytree(audited, tmp_path / "run"))
    edit_head(copied, lambda head: head.update(origin={}))
    assert "was not made by the command line" in fail("verify", slim, "--against", copied)
    (slim / MANIFEST).write_text("{}")
    assert "cannot be read: export again" in fail("verify", slim, "--against", audited)


def _tamper(weights: Path, *, amount: float) -> None:
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    torch.manual_seed(0)
    tensors[name] += amount * torch.randn_like(tensors[name])
    save_file(tensors, weights, metadata={"format": "pt"})


def _forge(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(record | {"files": hash_each(folder)} | changes))
