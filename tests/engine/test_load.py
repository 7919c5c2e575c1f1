"""Loading from folders that the tests save, and one clear line for what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from exitsafe.engine.load import hash_files, load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.features import tensors_in
from exitsafe.records import Sample
from tests.tiny_models import noise_image, save_tiny, skip_checks, tiny_llava, tiny_model, tiny_processor

SAMPLE = Sample(id="a", prompt="what colour is the left", images=(noise_image(1),), kind="benign")


@pytest.fixture(scope="module", params=["llava", "llava-siglip", "llava_next", "mllama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("model") / request.param)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="encoder='sound' is unknown; choose image"):
        load_vlm("organism", encoder="sound")


def test_a_saved_folder_answers_like_the_model_in_memory(folder: Path) -> None:
    loaded = load_vlm(folder)
    in_memory = VLM(tiny_model(folder.name), tiny_processor(folder.name), name="memory")
    assert not loaded.model.training
    assert loaded.num_layers == in_memory.num_layers
    assert loaded.default_exit == in_memory.default_exit
    answers = [vlm.generate([SAMPLE], 3, max_new_tokens=8)[0].text for vlm in (loaded, in_memory)]
    assert answers[0] == answers[1]


def test_a_printed_model_says_what_it_is_and_where_it_exits() -> None:
    assert str(load_vlm("organism")).splitlines() == [
        "VLM organism (llava, 1.1M parameters)",
        "  exits 1 to 8, default 7",
        "  float32 on cpu",
    ]


def test_dtype(folder: Path) -> None:
    assert load_vlm(folder).model.dtype == torch.float32
    loaded = load_vlm(folder, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.generate([SAMPLE], 2, max_new_tokens=4)[0].num_tokens >= 1


def test_the_hash_tells_checkpoints_apart(tmp_path: Path) -> None:
    first, second = save_tiny("llava", tmp_path / "one"), save_tiny("llava", tmp_path / "two")
    assert load_vlm(first).checkpoint_hash == load_vlm(second).checkpoint_hash
    config = json.loads((second / "generation_config.json").read_text())
    (second / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    assert load_vlm(first).checkpoint_hash != load_vlm(second).checkpoint_hash


def test_code_that_comes_with_a_checkpoint_is_hashed_too(tmp_path: Path) -> None:
    before = hash_files(tmp_path)
    (tmp_path / "processing_own.py").write_text("x = 1")
    assert hash_files(tmp_path) != before


def test_adapter(folder: Path, tmp_path: Path) -> None:
    plain = load_vlm(folder)
    adapted = get_peft_model(
        tiny_model(folder.name),
        LoraConfig(r=4, target_modules=plain.linear_layers, init_lora_weights=False),
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert names and not any("vision" in name for name in names)
    loaded = load_vlm(folder, adapter=tmp_path / "adapter")
    assert isinstance(loaded.model, PeftModel)
    assert loaded.adapter_hash is not None and plain.adapter_hash is None
    in_memory = VLM(adapted.eval(), tiny_processor(folder.name), name="memory")
    texts = [vlm.generate([SAMPLE], 2, max_new_tokens=8)[0].text for vlm in (loaded, in_memory, plain)]
    assert texts[0] == texts[1]
    hidden = []
    for vlm in (loaded, plain):
        prompt = vlm.encode_prompt(SAMPLE)
        features = vlm.prompt_features([prompt], [2])[0][2]
        assert features is not None
        hidden.append([*tensors_in(features)])
    assert all(map(torch.equal, *hidden)), "an adapter on the language model must not move image features"


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantization_leaves_the_encoder_alone(
    folder: Path, quantization: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs exitsafe[quantization]")
    skip_checks(monkeypatch)
    vlm = load_vlm(folder, quantization=quantization)
    kinds = {name: type(module).__name__ for name, module in vlm.model.named_modules()}
    linear = {name: kind for name, kind in kinds.items() if "Linear" in kind}
    inside = {kind for name, kind in linear.items() if "language_model" in name}
    outside = {kind for name, kind in linear.items() if "language_model" not in name}
    assert inside == {layer} and layer not in outside
    prompt = vlm.encode_prompt(SAMPLE)
    plain = load_vlm(folder)
    found = [model.prompt_features([prompt], [3])[0][3] for model in (vlm, plain)]
    torch.testing.assert_close(*([*tensors_in(features)] for features in found))
    if quantization == "int8":  # nf4 kernels need rows of 64 values, more than a tiny model has
        assert vlm.generate([SAMPLE], 3, max_new_tokens=4)[0].num_tokens >= 1


def test_adapters_are_told_apart_and_come_from_the_hub_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    for seed, name in enumerate(("one", "two")):
        model = tiny_model("llava")
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=load_vlm(folder).linear_layers, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(str(tmp_path / name))
    monkeypatch.setattr("exitsafe.engine.load.snapshot_download", lambda name, **_: str(tmp_path / Path(name).name))
    hashes = {load_vlm(folder, adapter=f"somebody/{name}").adapter_hash for name in ("one", "two")}
    assert hashes == {load_vlm(folder, adapter=tmp_path / name).adapter_hash for name in ("one", "two")}
    assert len(hashes) == 2


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_vlm(folder, adapter=tmp_path / "adapter")


def test_torn_checkpoints(tmp_path: Path) -> None:
    weights = save_tiny("llava", tmp_path / "weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_vlm(weights.parent)
    tokenizer = save_tiny("llava", tmp_path / "tokenizer") / "tokenizer.json"
    tokenizer.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_vlm(tokenizer.parent)


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no processor: copy the processor and tokenizer files next to the"):
        load_vlm(tmp_path)
    with pytest.raises(ModelError, match="no processor: save the processor"):
        VLM(tiny_llava(), None, name="memory")


def test_without_a_chat_template_the_plain_prompt_is_used(tmp_path: Path) -> None:
    vlm = load_vlm(save_tiny("llava", tmp_path))
    vlm.processor.chat_template = None
    with pytest.warns(UserWarning, match="no chat template"):
        prompt = vlm.encode_prompt(SAMPLE)
    assert vlm.processor.tokenizer.decode(prompt.input_ids).endswith("<image> what colour is the left")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json: give a Hub id or a folder"):
        load_vlm(tmp_path)
    with pytest.raises(ModelError, match="no/such-model is neither a local folder nor in the Hub cache"):
        load_vlm("no/such-model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"cannot load .*BertConfig"):
        load_vlm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load_vlm(tmp_path)


def test_settings_that_do_not_exist(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    with pytest.raises(InputError, match="dtype 'float7' is unknown; choose"):
        load_vlm(folder, dtype="float7")
    with pytest.raises(InputError, match="device 'abacus' is unknown; choose"):
        load_vlm(folder, device="abacus")
    with pytest.raises(InputError, match="quantization 'int1' is unknown; choose"):
        load_vlm(folder, quantization="int1")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_vlm(folder, adapter=tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path)
    torch.save(tiny_llava().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_vlm(folder)


def test_unreadable_images_and_placeholders_in_prompts(tmp_path: Path) -> None:
    vlm = load_vlm(save_tiny("llava", tmp_path / "model"))
    torn = tmp_path / "torn.png"
    noise_image(1).save(torn)
    torn.write_bytes(torn.read_bytes()[:200])
    for image, message in (
        (tmp_path / "none.png", "does not exist"),
        (torn, "cannot be read"),
        (b"x", "cannot be read"),
    ):
        with pytest.raises(InputError, match=f"sample b: image .*{message}"):
            vlm.encode_prompt(Sample(id="b", prompt="what", images=(image,), kind="benign"))
    with pytest.raises(InputError, match="contains the placeholder '<image>'"):
        vlm.encode_prompt(Sample(id="b", prompt="what <image>", kind="benign"))


def test_paths_that_do_not_exist_and_adapters_of_other_models(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    for missing in (tmp_path / "no-model", "./no-model"):
        with pytest.raises(ModelError, match="no-model does not exist"):
            load_vlm(missing)
    with pytest.raises(ModelError, match=r"adapter .*/lppo/adapter does not exist; .* let the run finish"):
        load_vlm(folder, adapter=tmp_path / "lppo" / "adapter")
    adapted = get_peft_model(tiny_model("llava"), LoraConfig(r=2, target_modules=r".*language_model.*q_proj$"))
    adapted.save_pretrained(str(tmp_path / "other"))
    settings = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    settings |= {"r": 4, "base_model_name_or_path": "another/model"}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError,
        match=r"does not fit this model: \d+ weights have a different shape .* it was made for another/model",
    ):
        load_vlm(folder, adapter=tmp_path / "other")


def test_a_model_with_an_adapter_beside_it_is_not_adapted_unasked(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    adapted = get_peft_model(tiny_model("llava"), LoraConfig(r=2, target_modules=r".*language_model.*q_proj$"))
    adapted.save_pretrained(str(folder))
    assert (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file()
    with pytest.raises(ModelError, match=r"contains an adapter \(adapter_config.json\): give its base model"):
        load_vlm(folder)


@pytest.mark.parametrize(
    "field",
    (
        {"megatron_config": {"x": 1}, "megatron_core": "somebody.module"},
        {"peft_type": "XLORA", "adapters": {"0": "somebody/adapter"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "somebody/model"},
    ),
)
def test_an_adapter_does_not_make_peft_load_code_or_files_from_elsewhere(field: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    adapted = get_peft_model(tiny_model("llava"), LoraConfig(r=2, target_modules=r".*language_model.*q_proj$"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(ModelError, match="makes PEFT load code or weights from elsewhere"):
        load_vlm(folder, adapter=tmp_path / "adapter")
