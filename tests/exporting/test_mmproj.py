"""The encoder's file for llama.cpp, and what must not be mixed. tests/engines runs such files in a real llama.cpp."""

from __future__ import annotations

import builtins
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import exitsafe
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.exporting.manifest import read_manifest
from exitsafe.exporting.mmproj import MMPROJ, check_can_be_written
from exitsafe.exporting.verification import check_files
from exitsafe.results.run import AuditRun
from tests.engines.served_models import served_model
from tests.exporting.slim_models import SAMPLES, adapted_vlm
from tests.exporting.test_verification import Short
from tests.tiny_models import save_tiny, tiny_llava, tiny_model, tiny_processor


def _fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", ("llava", "llava-siglip"))
def test_it_holds_the_blocks_of_the_exit_and_says_that_all_of_them_run(family: str, tmp_path: Path) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    out = exitsafe.export(vlm, exit_layer=4, out=tmp_path / "slim", to="gguf")
    fields = _fields(out / MMPROJ)
    assert (fields["clip.vision.block_count"], fields["clip.vision.feature_layer"]) == (4, [4])
    assert fields["clip.use_gelu"] == (family == "llava-siglip")
    assert (fields["general.architecture"], fields["general.type"]) == ("clip", "mmproj")
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out / MMPROJ).tensors}
    assert {name.split(".")[2] for name in tensors if name.startswith("v.blk")} == {"0", "1", "2", "3"}
    assert not [name for name in tensors if "post_ln" in name], "it would be applied to the features"
    assert ("v.class_embd" in tensors) == (family == "llava")
    tower, projector = vlm.base_model.model.vision_tower, vlm.base_model.model.multi_modal_projector
    wanted = {
        "v.blk.3.ffn_down.weight": tower.encoder.layers[3].mlp.fc2.weight,
        "v.position_embd.weight": tower.embeddings.position_embedding.weight,
        "v.patch_embd.weight": tower.embeddings.patch_embedding.weight,
        "mm.0.bias": projector.linear_1.bias,
        "mm.2.weight": projector.linear_2.weight,
    }
    for name, weight in wanted.items():
        assert np.array_equal(tensors[name].reshape(weight.shape), weight.detach().numpy()), name
    assert "mmproj.gguf" in read_manifest(out).files
    assert "--to gguf" in read_manifest(out).command


def test_smolvlm_keeps_the_last_norm_and_runs_as_many_blocks_as_it_has(tmp_path: Path) -> None:
    out = exitsafe.export(served_model("smolvlm"), exit_layer=4, out=tmp_path / "slim", to="gguf")
    fields = _fields(out / MMPROJ)
    assert (fields["clip.projector_type"], fields["clip.vision.block_count"]) == ("idefics3", 4)
    assert (fields["clip.vision.projector.scale_factor"], fields["clip.vision.preproc_image_size"]) == (2, 64)
    assert "clip.vision.feature_layer" not in fields and "clip.has_llava_projector" not in fields
    names = {tensor.name for tensor in gguf.GGUFReader(out / MMPROJ).tensors}
    assert {"v.post_ln.weight", "v.post_ln.bias", "mm.model.fc.weight", "v.blk.3.ln1.bias"} <= names
    assert "v.blk.4.ln1.bias" not in names


def test_it_names_the_audit_and_what_it_was_made_from(tmp_path: Path) -> None:
    model = load_vlm(save_tiny("llava", tmp_path / "model"))
    run = exitsafe.audit(model, SAMPLES, judges=[Short()], exit_layers=(3,), max_new_tokens=4, out=tmp_path / "run")
    out = exitsafe.export(model, exit_layer=3, out=tmp_path / "slim", to="gguf", audit=run)
    fields, parts = _fields(out / MMPROJ), read_manifest(out).parts
    assert parts is not None
    assert {
        name.removeprefix("exitsafe."): value for name, value in fields.items() if name.startswith("exitsafe.")
    } == {
        "exit_layer": 3,
        "base": model.checkpoint_hash,
        "audit": hashlib.sha256((tmp_path / "run" / "run.json").read_bytes()).hexdigest(),
        "encoder": parts.encoder,
        "language_model": parts.language_model,
    }


def test_a_merged_adapter_is_in_it_and_one_kept_is_refused(tmp_path: Path) -> None:
    vlm = adapted_vlm("llava", tmp_path, target_modules=["fc2", "linear_2"])
    plain = exitsafe.export(load_vlm(tmp_path / "model"), exit_layer=2, out=tmp_path / "plain", to="gguf")
    merged = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "merged", to="gguf")
    changed = [
        a.name
        for a, b in zip(*(gguf.GGUFReader(out / MMPROJ).tensors for out in (plain, merged)), strict=True)
        if not np.array_equal(a.data, b.data)
    ]
    assert sorted(changed) == ["mm.2.weight", "v.blk.0.ffn_down.weight", "v.blk.1.ffn_down.weight"]
    with pytest.raises(InputError, match="leave --keep-adapter out"):
        exitsafe.export(vlm, exit_layer=2, out=tmp_path / "kept", to="gguf", keep_adapter=True)


def _changed(**changes: Any) -> Any:
    config = tiny_llava().config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda: tiny_model("mllama").config,
            "this mllama model: it can write LLaVA with a CLIP or SigLIP tower, Idefics3",
        ),
        (lambda: tiny_model("llava_next").config, "this llava_next model: it can write LLaVA"),
        (lambda: _changed(vision_feature_layer=[1, 3]), "its projector reads several layers"),
        (lambda: _changed(vision_feature_select_strategy="full"), r"features that llama.cpp gives it \(default\)"),
        (lambda: _changed(projector_hidden_act="relu"), "not two linear layers with biases and a GELU"),
        (lambda: _changed(multimodal_projector_bias=False), "not two linear layers with biases and a GELU"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        check_can_be_written(make())


def test_an_encoder_with_another_activation_is_refused() -> None:
    config = tiny_llava().config
    config.vision_config.hidden_act = "silu"
    with pytest.raises(ModelError, match="has no silu activation in an encoder"):
        check_can_be_written(config)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_gguf(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(InputError, match=r'pip install "exitsafe\[gguf\]"'):
        check_can_be_written(tiny_llava().config)


@pytest.fixture
def two_exports(tmp_path: Path) -> tuple[AuditRun, Path, Path]:
    """A run, the export of its exit 3, and one of another repair of the same model."""
    bare = load_vlm(save_tiny("llava", tmp_path / "model"))
    run = exitsafe.audit(bare, SAMPLES, judges=[Short()], exit_layers=(2, 3), max_new_tokens=4, out=tmp_path / "run")
    other = adapted_vlm("llava", tmp_path / "other", seed=3)
    return (
        run,
        exitsafe.export(bare, exit_layer=3, out=tmp_path / "slim", to="gguf"),
        exitsafe.export(other, exit_layer=3, out=tmp_path / "repaired", to="gguf"),
    )


def test_parts_of_two_exports_are_noticed(two_exports: tuple[AuditRun, Path, Path]) -> None:
    run, slim, other = two_exports
    check_files(slim, run)
    before, now = read_manifest(slim).parts, read_manifest(other).parts
    assert before is not None and now is not None
    assert before.encoder == now.encoder, "the same encoder: the adapter is the language model's"
    assert before.language_model != now.language_model
    own = (slim / "model.safetensors").read_bytes()
    shutil.copy(other / "model.safetensors", slim)
    with pytest.raises(
        ModelError,
        match=r"model.safetensors\): its language model is not the one that was exported with the",
    ):
        check_files(slim, run)
    (slim / "model.safetensors").write_bytes(own)
    check_files(slim, run)
    shutil.copy(other / MMPROJ, slim)
    with pytest.raises(
        ModelError,
        match=r"mmproj.gguf\): mmproj.gguf is not the one that was exported with this language",
    ):
        check_files(slim, run)


def test_an_exchanged_encoder_is_named_and_a_damaged_file_is_not_called_exchanged(
    two_exports: tuple[AuditRun, Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    run, slim, _ = two_exports
    weights = load_file(slim / "model.safetensors")
    weights["multi_modal_projector.linear_1.bias"] += 1
    save_file(weights, slim / "model.safetensors")
    with pytest.raises(ModelError, match=r"its encoder is not the one"):
        check_files(slim, run)
    weights["language_model.lm_head.weight"] += 1
    save_file(weights, slim / "model.safetensors")
    with pytest.raises(ModelError, match=r"is not as it was exported \(changed: model.safetensors\)"):
        check_files(slim, run)
    (slim / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match=r"is not as it was exported \(changed: model.safetensors\)"):
        check_files(slim, run)


def test_a_manifest_without_parts_is_still_read(two_exports: tuple[AuditRun, Path, Path]) -> None:
    run, slim, _ = two_exports
    path = slim / "exitsafe.json"
    record = json.loads(path.read_bytes())
    del record["parts"], record["to"]
    path.write_text(json.dumps(record))
    assert check_files(slim, run).parts is None
