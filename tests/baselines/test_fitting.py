"""Fitting translators on tiny models: what is summed, held out, written and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exitsafe.baselines import fit_translators
from exitsafe.baselines.ridge import Moments, choose_ridge, fit_map, r_squared
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.exits.features import projector_inputs
from exitsafe.exits.translator_files import MAPS, RECORD, load_translators
from exitsafe.exits.translators import Translator
from exitsafe.records import Sample
from tests.tiny_models import noise_image, tiny_model, tiny_processor


def make_vlm(family: str = "llava") -> VLM:
    return VLM(tiny_model(family), tiny_processor(family), name=family, checkpoint_hash="c0ffee")


def pictures(count: int, *, first: int = 0) -> list[Sample]:
    sizes = [(28, 28), (40, 30), (30, 50)]
    return [
        Sample(id=f"p{n}", prompt="what", images=(noise_image(n, sizes[n % 3]),), kind="benign")
        for n in range(first, first + count)
    ]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "llava_next"])
def test_the_map_of_an_exit_equals_one_fitted_picture_by_picture(family: str, tmp_path: Path) -> None:
    vlm, samples = make_vlm(family), pictures(40)
    folder = fit_translators(vlm, samples, exit_layers=(2, vlm.default_exit), out=tmp_path / "maps")
    fitted, held_out = Moments(32), Moments(32)
    for number, sample in enumerate(samples):
        inputs = dict(vlm.encode_prompt(sample).media)
        found = {layer: projector_inputs(vlm, inputs, (layer,))[layer] for layer in (2, vlm.default_exit)}
        (held_out if number % 5 == 4 else fitted).add(found[2], found[vlm.default_exit])
    ridge, r2 = choose_ridge(fitted, held_out)
    expected = fit_map(fitted + held_out, ridge=ridge)
    tensors = load_file(folder / MAPS)
    assert sorted(tensors) == ["exit.2.bias", "exit.2.weight"]
    torch.testing.assert_close(tensors["exit.2.weight"], expected.weight.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tensors["exit.2.bias"], expected.bias.float(), rtol=1e-3, atol=1e-4)
    record = record_of(folder)
    (entry,) = record["exits"]
    assert (entry["exit_layer"], entry["ridge"]) == (2, ridge)
    assert entry["r2"] == pytest.approx(r2, abs=1e-4)
    bare = Translator(weight=torch.eye(32), bias=torch.zeros(32))
    assert entry["r2_untranslated"] == pytest.approx(r_squared(held_out, bare), abs=1e-4)
    assert entry["r2"] > entry["r2_untranslated"]
    assert entry["tokens"] == fitted.count + held_out.count
    assert record["pictures"]["count"] == 40
    assert record["pictures"]["held_out"] == 8


def test_translated_features_are_closer_to_the_default_exits_on_new_pictures(tmp_path: Path) -> None:
    vlm = make_vlm()
    plain = make_vlm()
    vlm.translators = load_translators(vlm, fit_translators(vlm, pictures(60), out=tmp_path / "maps"))
    inputs = {"pixel_values": torch.cat([vlm.encode_prompt(s).media["pixel_values"] for s in pictures(8, first=500)])}
    layers = (4, vlm.default_exit)
    before, after = projector_inputs(plain, inputs, layers), projector_inputs(vlm, inputs, layers)
    target = before[vlm.default_exit]
    assert torch.equal(after[vlm.default_exit], target)
    assert (after[4] - target).square().sum() < 0.5 * (before[4] - target).square().sum()


def test_harmful_and_repeated_pictures_do_not_count(tmp_path: Path) -> None:
    vlm, samples = make_vlm(), pictures(10)
    harmful = [replace(sample, id=f"h{sample.id}", kind="harmful") for sample in pictures(3, first=50)]
    again = [replace(sample, id=f"again-{sample.id}", prompt="is it red") for sample in samples[:4]]
    two = Sample(id="two", prompt="", images=(noise_image(90), noise_image(91)), kind="benign")
    bare = Sample(id="bare", prompt="what", kind="benign")
    one = fit_translators(vlm, [*samples, two], exit_layers=(1,), out=tmp_path / "one")
    other = fit_translators(vlm, [*harmful, *samples, *again, two, bare], exit_layers=(1,), out=tmp_path / "other")
    assert record_of(one)["pictures"]["count"] == 12
    assert record_of(one) == record_of(other)
    assert (one / MAPS).read_bytes() == (other / MAPS).read_bytes()


def test_again_is_done_at_once_and_anything_else_is_refused(tmp_path: Path) -> None:
    vlm, out, seen = make_vlm(), tmp_path / "maps", []
    samples = pictures(10)

    def progress(done: int, total: int, note: str) -> None:
        seen.append((done, total))

    fit_translators(vlm, samples, exit_layers=(1, 2), out=out, progress=progress)
    assert seen == [(number, 10) for number in range(1, 11)]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert fit_translators(vlm, samples, exit_layers=(1, 2), out=out, progress=progress) == out
    assert len(seen) == 10
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(RunError, match=r"holds other translators \(exits was \[1,2\], is now \[1\]\)"):
        fit_translators(vlm, samples, exit_layers=(1,), out=out)
    with pytest.raises(RunError, match=r"pictures.count was 10, is now 9"):
        fit_translators(vlm, samples[:9], exit_layers=(1, 2), out=out)
    vlm.checkpoint_hash = "bad"
    with pytest.raises(RunError, match=r"model.checkpoint was"):
        fit_translators(vlm, samples, exit_layers=(1, 2), out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match="is not a folder of translators"):
        fit_translators(vlm, samples, out=tmp_path / "mine")


def test_a_start_that_was_killed_before_the_record_begins_anew(tmp_path: Path) -> None:
    vlm, out = make_vlm(), tmp_path / "maps"
    out.mkdir()
    (out / MAPS).write_bytes(b"torn")
    (out / f".{RECORD}.part").write_bytes(b"to")
    fit_translators(vlm, pictures(5), exit_layers=(1,), out=out)
    assert load_translators(vlm, out).maps.keys() == {1}


def test_bad_input(tmp_path: Path) -> None:
    vlm, out = make_vlm(), tmp_path / "maps"
    with pytest.raises(InputError, match="4 benign pictures are too few"):
        fit_translators(vlm, pictures(4), out=out)
    with pytest.raises(InputError, match="nothing to translate: exit 5 is the default exit"):
        fit_translators(vlm, pictures(5), exit_layers="default", out=out)
    with pytest.raises(InputError, match="choose 1 to 6"):
        fit_translators(vlm, pictures(5), exit_layers=(7,), out=out)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    torn = Sample(id="torn", prompt="", images=(tmp_path / "torn.png",), kind="benign")
    with pytest.raises(InputError, match=r"sample torn: image .*torn.png cannot be read"):
        fit_translators(vlm, [*pictures(5), torn], out=out)
    assert not out.exists()
    vlm.translators = load_translators(vlm, fit_translators(vlm, pictures(5), out=out))
    with pytest.raises(InputError, match="has translators already"):
        fit_translators(vlm, pictures(6), out=tmp_path / "more")


def test_numbers_that_are_not_finite_stop_it_and_are_refused_when_read(tmp_path: Path) -> None:
    vlm, samples = make_vlm(), pictures(10)
    folder = fit_translators(vlm, samples, exit_layers=(2,), out=tmp_path / "maps")
    tensors = load_file(folder / MAPS)
    for damaged, words in (
        (
            tensors | {"exit.2.bias": tensors["exit.2.bias"] * torch.nan},
            "exit 2 is not a square matrix of finite numbers",
        ),
        (tensors | {"exit.2.bias": tensors["exit.2.bias"][:9]}, "exit 2 is not a square matrix"),
        (
            tensors | {"exit.3.bias": tensors["exit.2.bias"].clone()},
            r"has 1 tensors that are not in .* \(exit.3.bias",
        ),
    ):
        save_file(damaged, folder / MAPS)
        with pytest.raises(ModelError, match=words):
            load_translators(vlm, folder)
    with torch.no_grad():
        vlm.model.model.vision_tower.encoder.layers[3].mlp.fc2.bias[0] = torch.inf
    with pytest.raises(ModelError, match=r"exit 5: image features are NaN or infinite"):
        fit_translators(vlm, samples, exit_layers=(2,), out=tmp_path / "again")
    assert not (tmp_path / "again").exists()
