"""Blueprints: everything from the config, nothing from the weights; what is not supported is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from exitsafe.doctor import Typical, load_blueprint, typical_prompt
from exitsafe.engine.load import load_vlm
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.features import tensors_in
from exitsafe.records import Sample
from tests.tiny_models import noise_image, save_tiny

FAMILIES = ("llava", "llava-siglip", "llava_next", "mllama")


@pytest.fixture(params=FAMILIES)
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint and, beside it, a folder with its config and processor alone."""
    whole = save_tiny(request.param, tmp_path / "whole")
    return Path(shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_config_alone_says_what_the_model_says(bare: Path) -> None:
    blueprint, vlm = load_blueprint(bare), load_vlm(bare.parent / "whole", device="cpu")
    assert (blueprint.family, blueprint.num_layers, blueprint.default_exit) == (
        vlm.family,
        vlm.num_layers,
        vlm.default_exit,
    )
    assert blueprint.base_model.dtype == vlm.base_model.dtype
    assert blueprint.encoder == vlm.encoder
    shapes = {name: weight.shape for name, weight in vlm.model.named_parameters()}
    assert {name: weight.shape for name, weight in blueprint.model.named_parameters()} == shapes
    assert all(weight.is_meta for weight in blueprint.base_model.get_decoder().parameters())


def test_a_picture_that_fills_all_tiles_has_the_features_of_a_real_one(bare: Path) -> None:
    whole = load_blueprint(bare.parent / "whole")
    sample = Sample(id="s", prompt="how do i make a zorb", images=(noise_image(1, (56, 56)),), kind="benign")
    assumed, measured = typical_prompt(load_blueprint(bare)), typical_prompt(whole, [sample])
    assert assumed.feature_bytes == measured.feature_bytes
    assert (assumed.is_measured, measured.is_measured) == (False, True)
    assert _num_states(assumed) == _num_states(measured)
    vlm = load_vlm(bare.parent / "whole", device="cpu")
    prompt = vlm.encode_prompt(sample)
    assert measured.num_prompt_tokens == len(prompt.input_ids)
    found = vlm.prompt_features([prompt], (3,))[0][3]
    assert measured.feature_bytes == sum(tensor.nbytes for tensor in tensors_in(found))


def test_the_longest_prompt_is_among_those_with_the_most_pictures(bare: Path) -> None:
    whole = load_blueprint(bare.parent / "whole")
    samples = [
        Sample(id=f"s{i}", prompt=" ".join(["zorb"] * (1 + i)), images=(noise_image(i),), kind="benign")
        for i in range(8)
    ]
    longest = typical_prompt(whole, samples)
    assert longest.num_prompt_tokens == len(whole.encode_prompt(samples[-1]).input_ids)


def test_text_alone_has_no_features(bare: Path) -> None:
    typical = typical_prompt(load_blueprint(bare.parent / "whole"), [Sample(id="s", prompt="zorb", kind="benign")])
    assert (typical.feature_bytes, typical.image_states) == (0, None)


def test_another_type_is_the_config_s_no_longer(bare: Path) -> None:
    assert load_blueprint(bare, dtype="bfloat16").base_model.dtype == torch.bfloat16


def test_what_cannot_be_planned_is_said_in_one_line(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"cannot read the config of .*LlamaConfig"):
        load_blueprint(tmp_path / "llama")
    with pytest.raises(ModelError, match="nothing does not exist: give a Hub id or a folder"):
        load_blueprint(tmp_path / "nothing")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the config of"):
        load_blueprint(tmp_path / "torn")
    with pytest.raises(InputError, match="dtype 'int3' is unknown"):
        load_blueprint("organism", dtype="int3")
    with pytest.raises(InputError, match="quantization 'int3' is unknown"):
        load_blueprint("organism", quantization="int3")


def _num_states(typical: Typical) -> int | None:
    return None if typical.image_states is None else typical.image_states.shape[1]


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 0}, {"hidden_size": -4}, {"patch_size": 0}, {"num_attention_heads": 3}]
)
def test_an_impossible_config_is_refused_in_one_line(changes: dict[str, int], tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_blueprint, load_vlm):
        with pytest.raises(ModelError, match="cannot") as refusal:
            load(folder)
        assert "\n" not in str(refusal.value)
