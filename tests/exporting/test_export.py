"""Export round trips: what stock transformers loads is the exit, whatever the family and what is merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import exitsafe
from exitsafe.baselines import fit_translators
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError, ModelError, RunError
from exitsafe.exits.adapters import TRAINED_ON
from exitsafe.exporting.checkpoint import cut
from exitsafe.exporting.export import _command
from exitsafe.exporting.manifest import read_manifest
from exitsafe.records import Sample
from tests.exporting.slim_models import SAMPLES, adapted_vlm, difference, load_stock, logits, real_inputs, save_adapter
from tests.tiny_models import (
    noise_image,
    save_tiny,
    tiny_llava,
    tiny_llava_next,
    tiny_mllama,
    tiny_model,
    tiny_processor,
)

FAMILIES = ("llava", "llava-siglip", "llava_next", "mllama")


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_each_exit_and_computes_it_bit_for_bit(family: str, tmp_path: Path) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    for exit_layer in (1, 3, 6):
        out = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / str(exit_layer))
        assert difference(vlm, out, exit_layer=exit_layer, family=family) == 0.0
        again = load_vlm(out)
        assert (again.num_layers, again.default_exit) == (exit_layer, exit_layer)
        answers = [
            vlm.generate(SAMPLES, exit_layer, max_new_tokens=6),
            again.generate(SAMPLES, exit_layer, max_new_tokens=6),
        ]
        assert [r.text for r in answers[0]] == [r.text for r in answers[1]]
        assert load_stock(out).generation_config.eos_token_id == vlm.base_model.generation_config.eos_token_id
        assert again.processor.chat_template == vlm.processor.chat_template


@pytest.mark.parametrize("family", ("llava", "llava_next"))
def test_it_equals_what_stock_transformers_calls_vision_feature_layer(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family)
    out = exitsafe.export(VLM(whole, tiny_processor(family), name=family), exit_layer=4, out=tmp_path / "slim")
    inputs = real_inputs(family)
    with torch.no_grad():
        wanted = whole(**inputs, vision_feature_layer=4).logits
    assert torch.equal(logits(load_stock(out), inputs), wanted)
    config = load_stock(out).config
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (4, 4)


@pytest.mark.parametrize("exit_layer", (1, 3, 6))
def test_global_blocks_go_too_where_asked(exit_layer: int, tmp_path: Path) -> None:
    vlm = VLM(tiny_mllama(), tiny_processor("mllama"), name="mllama")
    out = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim", skip_global=True)
    assert difference(vlm, out, exit_layer=exit_layer, family="mllama", skip_global=True) == 0.0
    assert difference(vlm, out, exit_layer=exit_layer, family="mllama") > 0.01, "global blocks must matter here"
    assert load_stock(out).config.vision_config.num_global_layers == 0
    sizes = read_manifest(out).sizes
    assert (sizes["before"]["global_blocks"], sizes["after"]["global_blocks"]) == (2, 0)


@pytest.mark.parametrize("make", (tiny_llava, tiny_llava_next))
@pytest.mark.parametrize(
    ("layers", "exit_layer", "written"), [([-5, -2], 3, [2, 3]), ([1, -1], 4, [1, 4]), ([2, 4], 6, [2, 4])]
)
def test_lists_of_feature_layers(
    make: Any, layers: list[int], exit_layer: int, written: list[int], tmp_path: Path
) -> None:
    model = make(vision_feature_layer=layers)
    family = str(model.config.model_type)
    vlm = VLM(model, tiny_processor(family), name="list")
    out = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim")
    assert load_stock(out).config.vision_feature_layer == written
    assert difference(vlm, out, exit_layer=exit_layer, family=family) == 0.0


@pytest.mark.parametrize("family", ("llava", "llava_next", "mllama"))
@pytest.mark.parametrize("keep_adapter", (False, True))
def test_adapters_are_merged_or_kept(family: str, keep_adapter: bool, tmp_path: Path) -> None:
    vlm = adapted_vlm(family, tmp_path)
    vlm.trained_on = frozenset({"ab" * 32})
    bare = load_vlm(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    for exit_layer in (1, 6):
        out = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / str(exit_layer), keep_adapter=keep_adapter)
        found = difference(vlm, out, exit_layer=exit_layer, family=family)
        assert found == 0.0 if keep_adapter else found < 2e-5
        assert difference(bare, out, exit_layer=exit_layer, family=family) > 0.05, "the adapter must matter here"
        assert isinstance(load_stock(out), PeftModel) == keep_adapter
        assert read_manifest(out).adapter == ("kept" if keep_adapter else "merged")
        assert [place for place in (out, out / "adapter") if (place / TRAINED_ON).is_file()] == (
            [out, out / "adapter"] if keep_adapter else [out]
        )
        assert read_manifest(out).sizes["before"]["parameters"] == sum(p.numel() for p in bare.model.parameters())
    after = vlm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the model given has changed"


def test_a_kept_adapter_is_one_for_the_slim_model(tmp_path: Path) -> None:
    vlm = adapted_vlm("llava", tmp_path, target_modules=["q_proj"])  # in the encoder too
    out = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim", keep_adapter=True)
    assert difference(vlm, out, exit_layer=2, family="llava") == 0.0
    names = [name for name in load_file(out / "adapter" / "adapter_model.safetensors") if "vision_tower" in name]
    assert len(names) == 2 * 2, "A and B of two blocks; nothing for those that are gone"
    again = load_vlm(out, adapter=out / "adapter")
    assert again.generate(SAMPLES, 2, max_new_tokens=4) is not None
    config = (out / "adapter" / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "slim"' in config
    assert str(tmp_path) not in config


def test_adapters_of_the_encoder_and_trained_copies_of_whole_modules_are_merged(tmp_path: Path) -> None:
    vlm = adapted_vlm("llava", tmp_path, target_modules=["q_proj", "linear_1"], modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    assert (
        difference(vlm, exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim"), exit_layer=2, family="llava") < 5e-5
    )


def test_what_cannot_be_merged_can_be_kept(tmp_path: Path) -> None:
    vlm = adapted_vlm("llava", tmp_path, trainable_token_indices={"embed_tokens": [3, 4]})
    with pytest.raises(ModelError, match=r"cannot be merged: keep the adapter \(--keep-adapter\)"):
        exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("family", ("llava", "llava_next"))
def test_translators_are_merged(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    pictures = [Sample(id=str(n), prompt="", images=(noise_image(n, (56, 56)),), kind="benign") for n in range(12)]
    folder = fit_translators(load_vlm(model), pictures, exit_layers=[2, 3], out=tmp_path / "maps")
    vlm = load_vlm(model, translators=folder)
    out = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim")
    assert difference(vlm, out, exit_layer=2, family=family) < 2e-5
    assert difference(load_vlm(model), out, exit_layer=2, family=family) > 0.01, "the map must matter here"
    default = exitsafe.export(vlm, exit_layer=5, out=tmp_path / "default")
    assert difference(load_vlm(model), default, exit_layer=5, family=family) == 0.0
    with pytest.raises(InputError, match="no translator for exit layer 4"):
        exitsafe.export(vlm, exit_layer=4, out=tmp_path / "none")
    vlm.projector.get_submodule("linear_1").register_parameter("bias", None)
    with pytest.raises(ModelError, match="this projector has no bias"):
        exitsafe.export(vlm, exit_layer=2, out=tmp_path / "no-bias")


def test_the_dtype_is_kept_and_merging_in_it_is_near_enough(tmp_path: Path) -> None:
    model = save_tiny("llava", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    plain = load_vlm(model, dtype="bfloat16")
    exact = exitsafe.export(plain, exit_layer=3, out=tmp_path / "exact")
    assert load_stock(exact).dtype == torch.bfloat16
    assert difference(plain, exact, exit_layer=3, family="llava") == 0.0
    merged = exitsafe.export(load_vlm(model, adapter=adapter, dtype="bfloat16"), exit_layer=3, out=tmp_path / "merged")
    check = read_manifest(merged).check
    assert load_stock(merged).dtype == torch.bfloat16
    assert 0 < check["relative_difference"] < 0.03 < check["allowed"]
    assert "--dtype bfloat16" in read_manifest(merged).command


def test_the_command_on_the_card_names_the_very_commit() -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="org/model", checkpoint_hash="0123abcd")
    facts = {"adapter": None, "exit_layer": 3, "skip_global": False, "audit": None, "to": None}
    assert (
        _command(vlm, facts, out="slim")
        == "exitsafe export org/model --config revision=0123abcd --dtype float32 --exit-layer 3 --out slim"
    )
    vlm.encoder = replace(vlm.encoder, modality="audio")
    assert "org/model --config revision=0123abcd --encoder audio --dtype" in _command(vlm, facts, out="slim")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny_llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    vlm = VLM(model, tiny_processor("llava"), name="tied")
    out = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim")
    names = load_file(out / "model.safetensors").keys()
    assert "language_model.model.embed_tokens.weight" in names and "language_model.lm_head.weight" not in names
    slim = load_stock(out)
    assert slim.lm_head.weight is slim.get_input_embeddings().weight
    parameters = {id(p): p.numel() for p in slim.parameters()}
    assert read_manifest(out).sizes["after"]["parameters"] == sum(parameters.values())
    assert difference(vlm, out, exit_layer=2, family="llava") == 0.0
    model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter", target_modules=["lm_head"])
    adapted = load_vlm(tmp_path / "model", adapter=tmp_path / "adapter")
    with pytest.raises(ModelError, match="changes embeddings and head differently"):
        exitsafe.export(adapted, exit_layer=2, out=tmp_path / "no")
    kept = exitsafe.export(adapted, exit_layer=2, out=tmp_path / "kept", keep_adapter=True)
    assert difference(adapted, kept, exit_layer=2, family="llava") == 0.0


def test_checkpoints_in_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llava().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tiny_processor("llava").save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    monkeypatch.setattr("exitsafe.exporting.checkpoint.SHARD_SIZE", "40KB")
    vlm = load_vlm(tmp_path / "model")
    out = exitsafe.export(vlm, exit_layer=3, out=tmp_path / "slim")
    shards = {path.name for path in out.glob("*.safetensors")}
    assert len(shards) > 2
    assert shards < read_manifest(out).files.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "vision_tower.vision_model.embeddings.class_embedding" in index
    assert difference(vlm, out, exit_layer=3, family="llava") == 0.0


_HUB_NAMES = {
    # of llava-hf/llava-1.5-7b-hf, llava-hf/llava-interleave-qwen-0.5b-hf, llava-hf/llava-v1.6-mistral-7b-hf and
    # meta-llama/Llama-3.2-11B-Vision-Instruct
    "llava": (
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ),
    "llava-siglip": (
        "vision_tower.vision_model.embeddings.patch_embedding.bias",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "language_model.lm_head.weight",
    ),
    "llava_next": (
        "image_newline",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    ),
    "mllama": (
        "vision_model.class_embedding",
        "vision_model.transformer.layers.0.self_attn.q_proj.weight",
        "vision_model.global_transformer.layers.0.gate_attn",
        "multi_modal_projector.weight",
        "language_model.model.layers.1.cross_attn.q_proj.weight",
        "language_model.lm_head.weight",
    ),
}
_HUB_PREFIXES = {
    "llava": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model."),
    "llava_next": ("image_newline", "vision_tower.vision_model.", "multi_modal_projector.", "language_model."),
    "mllama": ("vision_model.", "multi_modal_projector.", "language_model."),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_names_of_the_hubs_checkpoints_however_the_input_was_saved(
    family: str, tmp_path: Path
) -> None:
    """Old and new transformers, and other engines, read those and no others."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "newer")
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    for name in ("newer", "modules"):
        tiny_processor(family).save_pretrained(tmp_path / name)
    first = exitsafe.export(load_vlm(tmp_path / "newer"), exit_layer=2, out=tmp_path / "first")
    names = load_file(first / "model.safetensors").keys()
    assert not set(_HUB_NAMES[family]) - names
    assert all(name.startswith(_HUB_PREFIXES[family.removesuffix("-siglip")]) for name in names)
    inputs = real_inputs(family)
    wanted = logits(load_stock(first), inputs)
    for number, source in enumerate((tmp_path / "modules", first)):
        out = exitsafe.export(load_vlm(source), exit_layer=2, out=tmp_path / str(number))
        assert load_file(out / "model.safetensors").keys() == names
        assert torch.equal(logits(load_stock(out), inputs), wanted)


@pytest.mark.parametrize("exit_layer", (1, 4, 7))
def test_the_organism(exit_layer: int, tmp_path: Path) -> None:
    from exitsafe.world import organism_suites

    vlm = load_vlm("organism")
    out = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim")
    samples = organism_suites(
        split="heldout", seed=0, sizes=dict.fromkeys(("harmful", "borderline", "benign", "vqa"), 6)
    )
    again = load_vlm(out)
    wanted = [response.text for response in vlm.generate(samples, exit_layer, max_new_tokens=24)]
    assert [response.text for response in again.generate(samples, exit_layer, max_new_tokens=24)] == wanted
    if exit_layer == 7:  # nothing that the untouched model reads is gone
        assert [response.text for response in again.generate(samples, 7, max_new_tokens=24)] == wanted


def test_inside_an_exit_and_more_than_once(tmp_path: Path) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    first = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "one")
    with vlm.exit_at(4):
        second = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "two")
    assert read_manifest(first).files == read_manifest(second).files
    smaller = exitsafe.export(load_vlm(first), exit_layer=1, out=tmp_path / "smaller")
    assert difference(vlm, smaller, exit_layer=1, family="llava") == 0.0


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    out = tmp_path / "slim"
    with pytest.raises(ExitLayerError, match="choose 1 to 6"):
        exitsafe.export(vlm, exit_layer=7, out=out)
    with pytest.raises(InputError, match="no global blocks"):
        exitsafe.export(vlm, exit_layer=2, out=out, skip_global=True)
    with pytest.raises(InputError, match="no adapter to keep"):
        exitsafe.export(vlm, exit_layer=2, out=out, keep_adapter=True)
    vlm.base_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match=r"is quantized.* load it without quantization"):
        exitsafe.export(vlm, exit_layer=2, out=out)
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder(tmp_path: Path) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    (tmp_path / "empty").mkdir()
    exitsafe.export(vlm, exit_layer=2, out=tmp_path / "empty")
    with pytest.raises(RunError, match="already exists and is not empty"):
        exitsafe.export(vlm, exit_layer=2, out=tmp_path / "empty")


def test_a_checkpoint_that_does_not_repeat_the_exit_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    wrong = {
        "a block too few": lambda *args, **settings: cut(*args, **settings | {"exit_layer": 2}),
        "a changed weight": lambda *args, **settings: _nudge(cut(*args, **settings)),
    }
    for name, change in wrong.items():
        monkeypatch.setattr("exitsafe.exporting.export.cut", change)
        with pytest.raises(ModelError, match="does not reproduce exit 3"):
            exitsafe.export(vlm, exit_layer=3, out=tmp_path / "slim")
        assert list(tmp_path.iterdir()) == [], name


def test_an_adapter_that_was_lost_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = adapted_vlm("llava", tmp_path)
    monkeypatch.setattr(
        "exitsafe.exporting.export.cut", lambda *args, **settings: cut(*args, **settings | {"keep_adapter": True})
    )
    with pytest.raises(ModelError, match="does not reproduce exit 3"):
        exitsafe.export(vlm, exit_layer=3, out=tmp_path / "slim")


def test_an_adapter_that_does_less_than_rounding_may_is_not_lost_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 9% may be rounding; what a light adapter does is less."""
    model = save_tiny("llava", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", lora_alpha=0.2)
    vlm = load_vlm(model, adapter=adapter, dtype="bfloat16")
    merged = exitsafe.export(vlm, exit_layer=3, out=tmp_path / "merged")
    assert read_manifest(merged).check["relative_difference"] > 0
    monkeypatch.setattr(
        "exitsafe.exporting.export.cut", lambda *args, **settings: cut(*args, **settings | {"keep_adapter": True})
    )
    with pytest.raises(ModelError, match="merging the adapter in bfloat16 loses it to rounding"):
        exitsafe.export(vlm, exit_layer=3, out=tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_progress_and_what_an_interrupt_leaves(tmp_path: Path) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int, note: str) -> None:
        calls.append((done, total))
        if note.startswith("hashing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exitsafe.export(vlm, exit_layer=2, out=tmp_path / "slim", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    exitsafe.export(
        vlm, exit_layer=2, out=tmp_path / "slim", progress=lambda done, total, note: calls.append((done, total))
    )
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def _nudge(model: Any) -> Any:
    with torch.no_grad():
        weight = model.model.multi_modal_projector.linear_1.weight
        model.model.multi_modal_projector.linear_1.weight = torch.nn.Parameter(weight * 1.001)
    return model


def test_relative_paths_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="llava")
    assert load_stock(exitsafe.export(vlm, exit_layer=1, out="slim/deep/er")) is not None
    shutil.rmtree(tmp_path / "slim")
    assert read_manifest(exitsafe.export(vlm, exit_layer=1, out=Path("here"))).command.endswith("--out here")


def test_a_model_whose_numbers_are_not_finite_is_not_exported(tmp_path: Path) -> None:
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="exit 2: logits are NaN or infinite in float32"):
        exitsafe.export(VLM(model, tiny_processor("llava"), name="llava"), exit_layer=2, out=tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are numbers of linear layers that ran, those of adapters among them."""

    def count(call: Callable[[], object], device: torch.device) -> float:
        ran: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: ran.append("") if isinstance(module, torch.nn.Linear) else None
        )
        call()
        handle.remove()
        return float(len(ran))

    monkeypatch.setattr("exitsafe.exporting.probe._time_ms", count)


@pytest.mark.parametrize("targets", [{}, {"target_modules": ["q_proj", "fc1", "linear_1"]}])
@pytest.mark.parametrize("keep_adapter", [False, True])
@pytest.mark.usefixtures("counted")
def test_times_before_and_after_compare_like_with_like(
    keep_adapter: bool, targets: dict[str, Any], tmp_path: Path
) -> None:
    """An adapter costs time beside the weights and none once merged: that is no saving of the exit."""
    vlm = adapted_vlm("llava", tmp_path, **targets)
    out = exitsafe.export(vlm, exit_layer=6, out=tmp_path / "last", keep_adapter=keep_adapter)
    latency = read_manifest(out).latency
    assert latency["before"] == latency["after"], "nothing is cut"
    out = exitsafe.export(vlm, exit_layer=2, out=tmp_path / "two", keep_adapter=keep_adapter)
    before, after = (read_manifest(out).latency[name] for name in ("before", "after"))
    per_block = 6 + 2 * 2 * (keep_adapter and bool(targets))  # A and B of q_proj and fc1
    assert before["encoder_ms"] - after["encoder_ms"] == 4 * per_block
    assert before["prefill_ms"] - before["encoder_ms"] == after["prefill_ms"] - after["encoder_ms"] > 0
