"""Translated exits against a computation by hand; nothing at the default exit; nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exitsafe.baselines import fit_translators
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.features import projector_inputs, tensors_in
from exitsafe.exits.translator_files import MAPS, RECORD, load_translators
from exitsafe.exits.translators import Translator, Translators, merge_translator
from exitsafe.records import Sample
from exitsafe.store.fingerprint import model_fingerprint
from tests.exits.test_cut import assert_restored, logits, same, snapshot, stock_inputs
from tests.tiny_models import NUM_LAYERS, noise_image, save_tiny, tiny_llava, tiny_model, tiny_processor

TRANSLATED = ("llava", "llava-siglip", "llava_next")


def random_translators(width: int = 32, exits: tuple[int, ...] = tuple(range(1, NUM_LAYERS + 1))) -> Translators:
    rng = torch.Generator().manual_seed(0)
    maps = {
        layer: Translator(
            weight=torch.randn(width, width, generator=rng) / width**0.5, bias=torch.randn(width, generator=rng)
        )
        for layer in exits
    }
    return Translators(maps, source="maps")


def translated(family: str, **changes: Any) -> tuple[VLM, VLM]:
    """The same model without and with translators."""
    model, processor = tiny_model(family), tiny_processor(family)
    with_them = VLM(model, processor, name=family, translators=random_translators(**changes))
    return VLM(model, processor, name=family), with_them


def pictures(count: int) -> list[Sample]:
    sizes = [(28, 28), (40, 30), (30, 50)]
    return [
        Sample(id=f"p{n}", prompt="what", images=(noise_image(n, sizes[n % 3]),), kind="benign") for n in range(count)
    ]


@torch.no_grad()
def by_hand(vlm: VLM, inputs: dict[str, Tensor], exit_layer: int, translator: Translator) -> list[Tensor]:
    """LLaVA's feature path written out: hidden state, class token off, map, projector."""
    inner, config = vlm.model.model, vlm.model.config
    hidden = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[exit_layer]
    if config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]
    return list(inner.multi_modal_projector(hidden @ translator.weight.T + translator.bias))


@pytest.mark.parametrize("family", ["llava", "llava-siglip"])
def test_features_equal_the_path_by_hand(family: str) -> None:
    _, vlm = translated(family)
    inputs = stock_inputs(vlm, num_images=2)
    found = vlm.image_features(inputs, vlm.exit_layers)
    assert vlm.translators is not None
    for exit_layer in vlm.exit_layers:
        if exit_layer != vlm.default_exit:
            expected = by_hand(vlm, inputs, exit_layer, vlm.translators.maps[exit_layer])
            torch.testing.assert_close([*tensors_in(found[exit_layer])], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TRANSLATED)
def test_any_code_inside_equals_a_stock_model_with_the_merged_projector(family: str) -> None:
    plain, vlm = translated(family)
    inputs = stock_inputs(vlm, num_images=2)
    linear = vlm.model.model.multi_modal_projector.linear_1
    kept = (linear.weight.data, linear.bias.data)
    for exit_layer in (1, 3, 6):
        if exit_layer == vlm.default_exit:
            continue
        with vlm.exit_at(exit_layer):
            found = logits(vlm, inputs)
        assert vlm.translators is not None
        weight, bias = merge_translator(linear, vlm.translators.maps[exit_layer])
        linear.weight.data, linear.bias.data = weight, bias
        expected = logits(plain, inputs, vision_feature_layer=exit_layer)
        linear.weight.data, linear.bias.data = kept
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        assert not torch.allclose(found, logits(plain, inputs, vision_feature_layer=exit_layer), atol=1e-2)


def test_merging_into_a_layer_without_bias_and_in_bfloat16() -> None:
    maps = random_translators().maps[1]
    linear = nn.Linear(32, 5, bias=False)
    weight, bias = merge_translator(linear, maps)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x @ weight.T + bias, linear(maps(x)), rtol=1e-5, atol=1e-5)
    assert {tensor.dtype for tensor in merge_translator(linear.bfloat16(), maps)} == {torch.bfloat16}
    assert maps(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", TRANSLATED)
def test_the_default_exit_is_untouched_and_leaving_restores(family: str) -> None:
    plain, vlm = translated(family)
    inputs = stock_inputs(vlm, num_images=2)
    untouched = logits(plain, inputs)
    before = snapshot(vlm)
    with vlm.exit_at(vlm.default_exit):
        assert torch.equal(logits(vlm, inputs), untouched)
    assert torch.equal(logits(vlm, inputs), untouched)
    at_two = logits(plain, inputs, vision_feature_layer=2)
    with pytest.raises(RuntimeError, match="boom"), vlm.exit_at(2):
        once = logits(vlm, inputs)
        assert not torch.equal(once, at_two)
        with vlm.exit_at(vlm.default_exit):
            assert torch.equal(logits(vlm, inputs), untouched)
        assert torch.equal(logits(vlm, inputs), once)
        with vlm.exit_at(2):
            assert torch.equal(logits(vlm, inputs), once), "a nested exit translates once, not twice"
        raise RuntimeError("boom")
    assert_restored(vlm, before)
    assert not vlm.projector._forward_pre_hooks
    assert torch.equal(logits(vlm, inputs), untouched)


@pytest.mark.parametrize("family", TRANSLATED)
def test_all_exits_from_one_pass_and_mixed_rows(family: str) -> None:
    _, vlm = translated(family)
    inputs = stock_inputs(vlm, num_images=2)
    found = vlm.image_features(inputs, vlm.exit_layers)
    for exit_layer in vlm.exit_layers:
        alone = vlm.image_features(inputs, [exit_layer])[exit_layer]
        assert same(found[exit_layer], alone)
    samples = pictures(4)
    layers = [1, vlm.default_exit, 3, 1]
    mixed = vlm.generate(samples, layers, max_new_tokens=8)
    one_by_one = [vlm.generate([s], layer, max_new_tokens=8)[0] for s, layer in zip(samples, layers, strict=True)]
    assert [response.text for response in mixed] == [response.text for response in one_by_one]
    with vlm.exit_at(3):
        inputs = stock_inputs(vlm)
        stock = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert stock.shape[1] > inputs["input_ids"].shape[1]


def test_an_exit_without_a_map_is_refused() -> None:
    _, vlm = translated("llava", exits=(1, 2))
    with pytest.raises(InputError, match=r"no translator for exit layer 3 \(available: 1, 2\)"), vlm.exit_at(3):
        pass
    with pytest.raises(InputError, match="no translator for exit layer 3"):
        vlm.image_features(stock_inputs(vlm), (3, 5))


def test_a_list_of_layers_is_translated_as_it_is_read(tmp_path: Path) -> None:
    """The projector reads several states side by side, and so does the map; deeper exits read the default's."""
    model, processor = tiny_llava(vision_feature_layer=[1, 3]), tiny_processor("llava")
    vlm = VLM(model, processor, name="tiny")
    assert vlm.default_exit == 3
    folder = fit_translators(vlm, pictures(30), out=tmp_path / "maps")
    vlm.translators = load_translators(vlm, folder)
    assert sorted(vlm.translators.maps) == [1, 2]
    assert vlm.translators.maps[1].weight.shape == (64, 64)
    inputs = stock_inputs(vlm)
    untouched = logits(VLM(model, processor, name="tiny"), inputs)
    with vlm.exit_at(6):
        assert torch.equal(logits(vlm, inputs), untouched)


def test_llama_is_refused(tmp_path: Path) -> None:
    vlm = VLM(tiny_model("mllama"), tiny_processor("mllama"), name="tiny")
    with pytest.raises(ModelError, match="this model cannot be translated"):
        fit_translators(vlm, pictures(5), exit_layers=(1, 2), out=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture
def maps(checkpoint: Path, tmp_path: Path) -> Path:
    return fit_translators(load_vlm(checkpoint), pictures(12), out=tmp_path / "maps")


def test_loaded_with_the_model_and_part_of_its_fingerprint(checkpoint: Path, maps: Path, tmp_path: Path) -> None:
    vlm = load_vlm(checkpoint, translators=maps)
    assert vlm.translators is not None
    tensors = load_file(maps / MAPS)
    assert torch.equal(vlm.translators.maps[2].weight, tensors["exit.2.weight"])
    plain = load_vlm(checkpoint)
    assert "translators" not in model_fingerprint(plain)
    with_them = model_fingerprint(vlm)
    assert with_them == model_fingerprint(plain) | {"translators": json.loads((maps / RECORD).read_text())["hash"]}
    other = fit_translators(plain, pictures(13), out=tmp_path / "other")
    assert model_fingerprint(load_vlm(checkpoint, translators=other))["translators"] != with_them["translators"]
    inputs = stock_inputs(vlm)
    received = projector_inputs(plain, inputs, (2,))[2]
    expected = vlm.translators.maps[2](received)
    torch.testing.assert_close(projector_inputs(vlm, inputs, (2,))[2], expected, rtol=1e-6, atol=1e-6)


def test_translators_of_another_model_and_damaged_ones_are_refused(
    checkpoint: Path, maps: Path, tmp_path: Path
) -> None:
    other = save_tiny("llava", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"were made for .*, which differs from .* in checkpoint: rerun exitsafe translate"
    ):
        load_vlm(other, translators=maps)
    with pytest.raises(ModelError, match=r"has no translators\.json"):
        load_vlm(checkpoint, translators=tmp_path / "nowhere")
    whole = (maps / MAPS).read_bytes()
    (maps / MAPS).write_bytes(whole[:-8])
    with pytest.raises(ModelError, match="damaged or missing"):
        load_vlm(checkpoint, translators=maps)
    (maps / MAPS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match="not the file that"):
        load_vlm(checkpoint, translators=maps)
    (maps / RECORD).write_text('{"model": 3}')
    with pytest.raises(ModelError, match="not a record of translators"):
        load_vlm(checkpoint, translators=maps)
