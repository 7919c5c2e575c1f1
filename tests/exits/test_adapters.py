"""An adapter is applied in full or refused, and a damaged folder is one line."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError
from exitsafe.exits import adapters
from tests.tiny_models import save_tiny, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_adapter(save_tiny("llava", folder / "llava"), folder / "adapter", seed=1)
    return folder


@pytest.fixture
def llava(tiny: Path) -> Path:
    return tiny / "llava"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """An adapter, to be damaged."""
    return Path(shutil.copytree(tiny / "adapter", tmp_path / "adapter"))


def make_adapter(model: Path, folder: Path, *, seed: int, **changes: Any) -> Path:
    """A PEFT folder with random weights, as `align` makes them."""
    base = tiny_model(model.name)
    torch.manual_seed(seed)  # the model has drawn its own weights from a seed of its own
    pattern = VLM(base, tiny_processor(model.name), name="memory").linear_layers
    settings: dict[str, Any] = {"r": 4, "target_modules": pattern, "init_lora_weights": False}
    adapted = get_peft_model(base, LoraConfig(**settings | changes))
    adapted.peft_config["default"].base_model_name_or_path = model.name
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load(model: Path, adapter: Path | None) -> VLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_vlm(model, adapter=adapter)


def test_a_snapshot_of_the_hub(llava: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.engine.load.snapshot_download", lambda name, **settings: str(folder))
    found = load(llava, "somebody/adapters")  # type: ignore[arg-type]
    assert found.adapter_hash == load(llava, folder).adapter_hash


def _remove_weights(folder: Path, model: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _remove_config(folder: Path, model: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _tear(folder: Path, model: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


def _other_rank(folder: Path, model: Path) -> None:
    change_config(folder, r=2)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _fewer_weights(folder: Path, model: Path) -> None:
    change_weights(folder, lambda weights: {name: weights[name] for name in sorted(weights)[1:]})


def _not_finite(folder: Path, model: Path) -> None:
    change_weights(folder, _first_infinite)


def _first_infinite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {min(weights): weights[min(weights)].fill_(torch.inf)}


def _no_json(folder: Path, model: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove_weights, r"adapter has no adapter_model\.safetensors"),
        (_remove_config, r"adapter has no adapter_config\.json"),
        (_tear, r"adapter: adapter_model\.safetensors is truncated or corrupt \(.*save or download it again"),
        (_other_rank, r"adapter does not fit this model: \d+ weights have a different shape .* made for llava"),
        (_fewer_weights, r"adapter does not fit this model: 1 of 28 adapter weights are missing"),
        (_not_finite, r"1 of 28 weights of .*adapter contain NaN or infinity \(model\.language_model"),
        (_no_json, r"adapter_config\.json cannot be read \(it is not JSON: "),
    ],
)
def test_what_cannot_be_used_is_one_line(
    llava: Path, folder: Path, damage: Callable[[Path, Path], None], words: str
) -> None:
    damage(folder, llava)
    with pytest.raises(ModelError, match=words) as error:
        load(llava, folder)
    assert "\n" not in str(error.value)


def _names_of_nothing(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("language_model", "some_other_model"): tensor for name, tensor in weights.items()}


def _half_of_it(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if ".layers.0." in name}


def _one_too_many(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = min(weights).replace(".layers.0.", ".layers.7.")
    return weights | {extra: weights[min(weights)].clone()}


def _twice_as_wide(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in weights.items()}


def _none_at_all(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_names_of_nothing, r"28 of 28 adapter weights are missing .*; 28 of 28 weights in the file match nothing"),
        (_half_of_it, r"14 of 28 adapter weights are missing from the file \(model\.language_model\.layers\.1\.\S+ "),
        (_one_too_many, r"1 of 29 weights in the file match nothing .*layers\.7\."),
        (_twice_as_wide, r"weights have a different shape .*made for llava; use the adapter's own model"),
        (_none_at_all, r"has no weights"),
        (_first_infinite, r"1 of 28 weights of .* contain NaN or infinity"),
    ],
)
def test_an_adapter_acts_whole_or_not_at_all(
    llava: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError, match=words) as error:
        load_vlm(llava, adapter=folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["bias", "modules_to_save"])
def test_biases_and_copies_of_modules_belong_to_an_adapter_too(llava: Path, tmp_path: Path, missing: str) -> None:
    pattern = r".*language_model.*(q_proj|down_proj)$"
    adapter = make_adapter(llava, tmp_path, seed=3, target_modules=pattern, modules_to_save=["linear_1"])
    load(llava, adapter)
    if missing == "bias":
        change_config(adapter, target_modules=r".*vision_tower.*q_proj$", bias="lora_only")
    change_weights(adapter, lambda weights: {name: tensor for name, tensor in weights.items() if "lora" in name})
    with pytest.raises(ModelError, match="does not fit this model"):
        load(llava, adapter)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read \\(it is not JSON: "),
        ("[" * 100_000, "cannot be read \\(it is nested too deeply\\)"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "cannot be read \\(it is nested too deeply\\)"),
        ("[1]", "cannot be read \\(it is not a JSON object\\)"),
        ({"peft_type": "LORRA"}, r"has peft_type 'LORRA', which this version of PEFT does not support"),
        ({"peft_type": ["LORA"]}, r"does not support"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, r"PREFIX_TUNING adapter, which changes the prompt"),
        ({"r": "4"}, r"r is not a number"),
        ({"lora_alpha": 10**400}, r"does not fit this model: "),
        ({"lora_alpha": float("nan")}, r"cannot be read \(it contains NaN, which is not a number\)"),
        ({"r": 10**9}, r"says rank 1000000000, but no weight in the file has more than \d+ rows"),
        ({"rank_pattern": 4}, r"does not fit this model"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"says rank 1000000000"),
        ({"target_modules": ["zorb"]}, r"does not fit this model: Target modules"),
        ({"target_modules": 7}, r"does not fit this model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, r"makes PEFT load code .*megatron_config"),
    ],
)
def test_a_damaged_config_is_one_line(llava: Path, folder: Path, content: Any, words: str) -> None:
    if isinstance(content, str):
        (folder / "adapter_config.json").write_text(content)
    else:
        change_config(folder, **content)
    with pytest.raises(ModelError, match=words) as error:
        load_vlm(llava, adapter=folder)
    assert "\n" not in str(error.value)


SLOW = r"(([a-z_.0-9]+)+)+!"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content",
    [
        {"target_modules": SLOW + r"|.*language_model\..*_proj"},
        {"exclude_modules": "(.|.)" * 40 + "!"},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"modules_to_save": [SLOW]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [SLOW]},
    ],
    ids=lambda content: next(reversed(content)),
)
def test_a_pattern_that_never_ends_is_refused_in_time(
    llava: Path, folder: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "PATTERN_SECONDS", 1.0)
    change_config(folder, **content)
    with pytest.raises(ModelError, match=r"adapter_config\.json contains a pattern that takes more than 1 sec"):
        load_vlm(llava, adapter=folder)


def test_an_alarm_while_an_adapter_is_loaded_is_no_fault_of_its_file(
    llava: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ring(*_: Any, **__: Any) -> None:
        raise TimeoutError("too late")

    monkeypatch.setattr(PeftModel, "load_adapter", ring)
    with pytest.raises(ModelError, match=r"^cannot load [^ ]*/llava: too late$"):
        load_vlm(llava, adapter=folder)


def test_an_adapter_without_effect_and_one_of_another_model_are_pointed_out(llava: Path, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_vlm(llava, adapter=folder)
    change_config(folder, base_model_name_or_path="somebody/llava-larger")
    with pytest.warns(UserWarning, match=r"adapter was made for somebody/llava-larger, but the model is .*/llava:"):
        load_vlm(llava, adapter=folder)
    change_weights(folder, lambda weights: {name: w * (".lora_A" in name) for name, w in weights.items()})
    with pytest.warns(UserWarning, match=r"changes nothing: every lora_B weight is zero"):
        load_vlm(llava, adapter=folder)
