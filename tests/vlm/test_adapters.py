"""One adapter per exit: each acts at its exit and nowhere else, and answers are those of a model with it alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from exitsafe.errors import ModelError
from exitsafe.records import Sample
from exitsafe.vlm import VLM, Row, adapters, load_vlm
from exitsafe.vlm.adapters import as_ranges
from tests.tiny_models import noise_image, save_tiny, tiny_model

OWN = (2, 4, 5)
SAMPLES = [
    Sample(id=f"s{number}", prompt=prompt, images=(noise_image(number),) if number else (), kind="benign")
    for number, prompt in enumerate(["how do i", "what colour is the left", "make a red zorb", "what is the shape"])
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model with adapters for some exits, and the same model with each of them alone."""

    model: Path
    adapters: Path
    vlm: VLM
    singles: dict[str | None, VLM]

    def alone(self, exit_layer: int) -> VLM:
        """The model with this exit's adapter for all exits; without one where the exit has none."""
        return self.singles[f"layer-{exit_layer:02}" if exit_layer in OWN else None]


@pytest.fixture(scope="module", params=["llava lora", "llava full", "mllama lora"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    family, kind = request.param.split()
    folder = tmp_path_factory.mktemp("place")
    model, adapters = save_tiny(family, folder / family), folder / "adapter"
    for layer in OWN:
        make_adapter(model, adapters / f"layer-{layer:02}", seed=layer, is_full=kind == "full")
    singles: dict[str | None, VLM] = {path.name: load(model, path) for path in adapters.iterdir()}
    return Place(model=model, adapters=adapters, vlm=load(model, adapters), singles=singles | {None: load(model, None)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for layer in (1, 2):
        make_adapter(save_tiny("llava", folder / "llava"), folder / "adapter" / f"layer-{layer:02}", seed=layer)
    return folder


@pytest.fixture
def llava(tiny: Path) -> Path:
    return tiny / "llava"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """Adapters of exits 1 and 2, to be damaged."""
    return Path(shutil.copytree(tiny / "adapter", tmp_path / "adapter"))


def make_adapter(model: Path, folder: Path, *, seed: int, is_full: bool = False, **changes: Any) -> Path:
    """A PEFT folder with random weights, as `align` makes them."""
    base = tiny_model(model.name)
    torch.manual_seed(seed)  # the model has drawn its own weights from a seed of its own
    pattern = VLM(base, None, name="memory").language_model_pattern
    settings: dict[str, Any] = {"r": 4, "target_modules": pattern, "init_lora_weights": False}
    if is_full:
        settings = {"target_modules": "dummy-target-modules", "modules_to_save": ["language_model", "lm_head"]}
    adapted = get_peft_model(base, LoraConfig(**settings | changes))
    if is_full:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = model.name
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load(model: Path, adapter: Path | None) -> VLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_vlm(model, adapter=adapter)


def logits(vlm: VLM) -> Tensor:
    """What the model says of a prompt with a picture, by Hugging Face's own forward."""
    prompt = vlm.encode_prompt(SAMPLES[1])
    inputs = {"input_ids": torch.tensor([list(prompt.input_ids)]), **prompt.image_inputs}
    if "cross_attention_mask" in inputs:
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].reshape(1, len(prompt.input_ids), 1, -1)
    with torch.no_grad():
        found: Tensor = vlm.model(**inputs).logits
    return found


def test_at_each_exit_its_own_adapter_acts_bit_for_bit(place: Place) -> None:
    vlm = place.vlm
    seen = []
    for exit_layer in vlm.exit_layers:
        single = place.alone(exit_layer)
        with vlm.exit_at(exit_layer), single.exit_at(exit_layer):
            assert torch.equal(logits(vlm), logits(single)), exit_layer
            seen.append(logits(vlm))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_outside_an_exit_the_default_exits_adapter_acts_and_comes_back(place: Place) -> None:
    vlm = place.vlm
    single = place.alone(vlm.default_exit)
    before = logits(single)
    assert torch.equal(logits(vlm), before)
    with vlm.exit_at(2):
        inner = logits(vlm)
        with vlm.exit_at(3):
            assert vlm.adapters is not None and vlm.adapters.active is None
            with vlm.exit_at(4), pytest.raises(ZeroDivisionError), vlm.exit_at(2):
                raise ZeroDivisionError
            assert vlm.adapters.active is None
        assert torch.equal(logits(vlm), inner)
    assert torch.equal(logits(vlm), before)
    with pytest.raises(ZeroDivisionError), vlm.exit_at(1):
        raise ZeroDivisionError
    assert torch.equal(logits(vlm), before)
    assert not any(parameter.requires_grad for name, parameter in vlm.model.named_parameters() if "layer-" in name)


def test_rows_of_mixed_exits_answer_as_with_their_adapter_alone(place: Place) -> None:
    vlm = place.vlm
    exits = [2, 3, 4, 5, 2, 6, 1, 4]
    asked = [*SAMPLES, *(Sample(id=f"{s.id}b", prompt=s.prompt, images=s.images, kind=s.kind) for s in SAMPLES)]
    with vlm.exit_at(2):
        mixed = vlm.generate(asked, exits, max_new_tokens=6, temperature=1.0, seed=3, batch_size=3)
        assert vlm.adapters is not None and vlm.adapters.active == "layer-02"
    texts = []
    for sample, exit_layer in zip(asked, exits, strict=True):
        single = place.alone(exit_layer)
        texts += single.generate([sample], exit_layer, max_new_tokens=6, temperature=1.0, seed=3)
    assert [response.text for response in mixed] == [response.text for response in texts]
    base = place.singles[None].generate(asked, exits, max_new_tokens=6, temperature=1.0, seed=3)
    assert [response.text for response in mixed] != [response.text for response in base]


def test_between_answers_the_caller_finds_the_model_as_it_was(place: Place) -> None:
    vlm = place.vlm
    assert vlm.adapters is not None
    outside = vlm.adapters.active
    rows = make_rows(vlm, 2) + make_rows(vlm, 3)
    found = []
    for index, _ in vlm.complete(rows, max_new_tokens=3, temperature=0.0, seed=0, batch_size=2):
        assert vlm.adapters.active == outside
        found.append(index)
    assert sorted(found) == list(range(len(rows)))


def make_rows(vlm: VLM, exit_layer: int) -> list[Row]:
    prompts = [vlm.encode_prompt(sample) for sample in SAMPLES]
    features = vlm.prompt_features(prompts, [exit_layer])
    pairs = zip(prompts, features, strict=True)
    return [Row(prompt=prompt, exit_layer=exit_layer, features=found[exit_layer]) for prompt, found in pairs]


def test_hidden_states_of_responses_are_those_of_the_exits_adapter(place: Place) -> None:
    vlm = place.vlm
    for exit_layer in (2, 3):
        single = place.alone(exit_layer)
        found = []
        for each in (vlm, single):
            row = make_rows(each, exit_layer)[1]
            responses = [torch.tensor([10, 11]), torch.tensor([12])]
            found.append(each.response_states([row, row], responses)[0].detach())
            found.append(each.packed_response_states([row, row], responses, group_size=2)[0].detach())
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    with pytest.raises(AssertionError, match="row_key"):
        vlm.response_states([make_rows(vlm, 2)[1], make_rows(vlm, 3)[1]], [torch.tensor([10])] * 2)


def test_image_features_are_those_of_the_untouched_model(place: Place) -> None:
    vlm, plain = place.vlm, place.singles[None]
    inputs = vlm.encode_prompt(SAMPLES[1]).image_inputs
    found, wanted = (each.image_features(inputs, each.exit_layers) for each in (vlm, plain))
    for exit_layer, features in found.items():
        assert all(torch.equal(a, b) for a, b in zip(features, wanted[exit_layer], strict=True))


def test_which_adapter_acts_where_can_be_asked(place: Place) -> None:
    vlm = place.vlm
    own = [None, "layer-02", None, "layer-04", "layer-05", None]
    assert [vlm.adapter_at(exit_layer) for exit_layer in vlm.exit_layers] == own
    assert vlm.adapters is not None and vlm.adapters.active == own[vlm.default_exit - 1]
    assert place.singles[None].adapter_at(2) is None
    assert place.alone(2).adapter_at(6) == "default"


def test_exits_without_an_adapter_are_named_once(place: Place) -> None:
    with pytest.warns(UserWarning, match=r"has no adapter for exits 1,3,6, which answer with the base model") as seen:
        load_vlm(place.model, adapter=place.adapters)
    assert len([warning for warning in seen if "base model" in str(warning.message)]) == 1


def test_ranges() -> None:
    assert as_ranges([]) == ""
    assert as_ranges([1, 2, 3, 5, 6, 9]) == "1-3,5,6,9"


def test_the_hash_covers_every_layer(llava: Path, folder: Path, tmp_path: Path) -> None:
    first = load(llava, folder).adapter_hash
    assert first == load(llava, Path(shutil.copytree(folder, tmp_path / "copy"))).adapter_hash
    make_adapter(llava, folder / "layer-02", seed=9)
    second = load(llava, folder).adapter_hash
    (folder / "layer-02").rename(folder / "layer-03")
    assert len({first, second, load(llava, folder).adapter_hash}) == 3


def test_a_snapshot_of_the_hub(llava: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.vlm.load.snapshot_download", lambda name, **settings: str(folder))
    found = load(llava, "somebody/adapters")  # type: ignore[arg-type]
    assert found.adapter_hash == load(llava, folder).adapter_hash
    assert found.adapter_at(2) == "layer-02"


def _remove_weights(folder: Path, model: Path) -> None:
    (folder / "layer-02" / "adapter_model.safetensors").unlink()


def _remove_config(folder: Path, model: Path) -> None:
    (folder / "layer-02" / "adapter_config.json").unlink()


def _tear(folder: Path, model: Path) -> None:
    weights = folder / "layer-02" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


def _other_rank(folder: Path, model: Path) -> None:
    change_config(folder / "layer-02", r=2)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _fewer_weights(folder: Path, model: Path) -> None:
    change_weights(folder / "layer-02", lambda weights: {name: weights[name] for name in sorted(weights)[1:]})


def _base_weights(folder: Path, model: Path) -> None:
    head = {"base_model.model.lm_head.weight": torch.zeros(30, 32)}
    change_weights(folder / "layer-02", lambda weights: weights | head)


def _not_finite(folder: Path, model: Path) -> None:
    change_weights(folder / "layer-02", _first_infinite)


def _first_infinite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {min(weights): weights[min(weights)].fill_(torch.inf)}


def _other_model(folder: Path, model: Path) -> None:
    change_config(folder / "layer-02", base_model_name_or_path="somebody/larger")


def _other_modules(folder: Path, model: Path) -> None:
    make_adapter(model, folder / "layer-02", seed=1, target_modules=["lm_head"])


def _other_kind(folder: Path, model: Path) -> None:
    change_config(folder / "layer-02", peft_type="IA3")


def _with_bias(folder: Path, model: Path) -> None:
    change_config(folder / "layer-02", bias="all")


def _too_deep(folder: Path, model: Path) -> None:
    (folder / "layer-02").rename(folder / "layer-07")


def _twice(folder: Path, model: Path) -> None:
    shutil.copytree(folder / "layer-02", folder / "layer-2")


def _both(folder: Path, model: Path) -> None:
    make_adapter(model, folder, seed=5)


def _in_the_encoder(folder: Path, model: Path) -> None:
    for layer in (1, 2):
        make_adapter(model, folder / f"layer-{layer:02}", seed=layer, target_modules=["q_proj"])


def _no_json(folder: Path, model: Path) -> None:
    (folder / "layer-02" / "adapter_config.json").write_text("{")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove_weights, r"layer-02 has no adapter_model\.safetensors"),
        (_remove_config, r"layer-02 has no adapter_config\.json"),
        (_tear, r"layer-02: adapter_model\.safetensors is truncated or corrupt \(.*save or download it again"),
        (_other_rank, r"layer-02 does not fit this model: \d+ weights have a different shape .* made for llava"),
        (_fewer_weights, r"layer-02 does not fit this model: 1 of 28 adapter weights are missing"),
        (_base_weights, r"1 of 29 weights in the file match nothing in the model's adapter \(lm_head\.weight\)"),
        (_not_finite, r"1 of 28 weights of .*layer-02 hold NaN or infinite numbers \(model\.language_model"),
        (_other_model, r"layer-02 and layer-01 differ in base_model_name_or_path"),
        (_other_modules, r"layer-02 and layer-01 differ in target_modules"),
        (_other_kind, r"layer-02 is not a LoRA adapter"),
        (_with_bias, r"layer-02 is not a LoRA adapter with bias 'none'"),
        (_too_deep, r"layer-07 belongs to no exit: this encoder has 6 blocks"),
        (_twice, r"layer-2 and layer-02 are for the same exit: keep one"),
        (_both, r"holds an adapter for all exits and layer-01 too: keep one"),
        (_in_the_encoder, r"outside the language model, at model\.vision_tower"),
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
        (_none_at_all, r"holds no weights"),
        (_first_infinite, r"1 of 28 weights of .* hold NaN or infinite numbers"),
    ],
)
def test_an_adapter_acts_whole_or_not_at_all(
    llava: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    """For one adapter, for adapters per exit, and however the model is then used: all of them load it here."""
    change_weights(folder / "layer-02", change)
    for adapter in (folder / "layer-02", folder):
        with pytest.raises(ModelError, match=words) as error:
            load_vlm(llava, adapter=adapter)
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
        ({"peft_type": "LORRA"}, r"names the peft_type 'LORRA', which this version of PEFT does not know"),
        ({"peft_type": ["LORA"]}, r"does not know"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, r"PREFIX_TUNING adapter, which changes the prompt"),
        ({"r": "4"}, r"r is not a number"),
        ({"lora_alpha": 10**400}, r"does not fit this model: "),
        ({"lora_alpha": float("nan")}, r"cannot be read \(it holds NaN, which is not a number\)"),
        ({"r": 10**9}, r"says rank 1000000000, but no weight in the file has more than \d+ rows"),
        ({"rank_pattern": 4}, r"does not fit this model"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"says rank 1000000000"),
        ({"target_modules": ["zorb"]}, r"does not fit this model: Target modules"),
        ({"target_modules": 7}, r"does not fit this model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, r"makes PEFT load code .*megatron_config"),
    ],
)
def test_a_damaged_config_is_one_line(llava: Path, folder: Path, content: Any, words: str) -> None:
    adapter = folder / "layer-01"
    if isinstance(content, str):
        (adapter / "adapter_config.json").write_text(content)
    else:
        change_config(adapter, **content)
    with pytest.raises(ModelError, match=words) as error:
        load_vlm(llava, adapter=adapter)
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
    change_config(folder / "layer-01", **content)
    with pytest.raises(ModelError, match=r"adapter_config\.json names modules by a pattern that takes more than 1 sec"):
        load_vlm(llava, adapter=folder / "layer-01")


def test_an_alarm_while_an_adapter_is_loaded_is_no_fault_of_its_file(
    llava: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ring(*_: Any, **__: Any) -> None:
        raise TimeoutError("too late")

    monkeypatch.setattr(PeftModel, "load_adapter", ring)
    with pytest.raises(ModelError, match=r"^cannot load [^ ]*/llava: too late$"):
        load_vlm(llava, adapter=folder / "layer-01")


def test_an_adapter_without_effect_and_one_of_another_model_are_pointed_out(llava: Path, folder: Path) -> None:
    adapter = folder / "layer-01"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_vlm(llava, adapter=adapter)
    change_config(adapter, base_model_name_or_path="somebody/llava-larger")
    with pytest.warns(UserWarning, match=r"layer-01 was made for somebody/llava-larger, but the model is .*/llava:"):
        load_vlm(llava, adapter=adapter)
    change_weights(adapter, lambda weights: {name: w * (".lora_A" in name) for name, w in weights.items()})
    with pytest.warns(UserWarning, match=r"changes nothing: every lora_B weight is zero"):
        load_vlm(llava, adapter=adapter)
