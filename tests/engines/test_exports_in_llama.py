"""Encoder files in a real llama.cpp: which exit each of them runs, by the probabilities of the first word.

A random model is asked about square pictures of its own size, which llama.cpp does not resize. Each server is compared
with every exit in transformers; a distance is the mean difference of log-probabilities over questions and words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import exitsafe
from exitsafe.engine.vlm import VLM
from exitsafe.exporting.mmproj import MMPROJ
from exitsafe.records import Sample
from exitsafe.world.suites import organism_suites
from tests.engines.gguf_models import Bits, shipped, smollm2, smollm2_llava, write_encoder, write_language_model
from tests.engines.llama_server import llama_server
from tests.engines.served_models import served_model
from tests.engines.server import ask
from tests.tiny_models import WORDS, noise_image

pytestmark = pytest.mark.engines
EXITS = range(1, 7)
_ROUNDING = 5e-3
_ALONE = {"cache_prompt": False}
"""With its cache a second answer is not the first, bit for bit."""


@pytest.mark.parametrize("exit_layer", (1, 3, 6))
def test_siglip_is_exact_with_the_layer_in_its_file_and_one_block_short_without(
    exit_layer: int, tmp_path: Path
) -> None:
    vlm = served_model("llava-siglip")
    model = write_language_model(vlm, tmp_path / "model.gguf")
    right = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim", to="gguf") / MMPROJ
    short = write_encoder(vlm, tmp_path / "short.gguf", exit_layer=exit_layer, feature_layer=False)
    found = _distances(vlm, model, right, tmp_path)
    assert _nearest(found) == exit_layer
    assert found[exit_layer] < _ROUNDING < min(found[each] for each in EXITS if each != exit_layer)
    found = _distances(vlm, model, short, tmp_path)
    if exit_layer == 1:  # no block at all, which is no exit
        assert min(found.values()) > _ROUNDING
    else:
        assert _nearest(found) == exit_layer - 1 and found[exit_layer - 1] < _ROUNDING


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    vlm = served_model("llava-siglip")
    vlm.model.to(dtype)
    encoder = write_encoder(vlm, tmp_path / "encoder.gguf", exit_layer=3)
    vlm.model.float()  # the same rounded weights
    found = _distances(vlm, write_language_model(vlm, tmp_path / "model.gguf"), encoder, tmp_path)
    assert _nearest(found) == 3
    assert found[3] < 0.05 < min(found[each] for each in EXITS if each != 3)


@pytest.mark.parametrize("exit_layer", (2, 6))
def test_smolvlm_is_exact(exit_layer: int, tmp_path: Path) -> None:
    vlm = served_model("smolvlm")
    model = write_language_model(vlm, tmp_path / "model.gguf")
    encoder = exitsafe.export(vlm, exit_layer=exit_layer, out=tmp_path / "slim", to="gguf") / MMPROJ
    found = _distances(vlm, model, encoder, tmp_path)
    assert _nearest(found) == exit_layer
    assert found[exit_layer] < _ROUNDING < min(found[each] for each in EXITS if each != exit_layer)


@pytest.mark.parametrize("exit_layer", (3, 6))
def test_clip_never_gives_the_exit(exit_layer: int, tmp_path: Path) -> None:
    vlm = served_model("llava")
    model = write_language_model(vlm, tmp_path / "model.gguf")
    encoder = write_encoder(vlm, tmp_path / "encoder.gguf", exit_layer=exit_layer)
    found = _distances(vlm, model, encoder, tmp_path)
    assert min(found.values()) > 20 * _ROUNDING


@pytest.mark.parametrize("bits", ("Q8_0", "Q4_0"))
def test_the_weights_that_ship_are_the_reference_for_fewer_bits(bits: Bits, tmp_path: Path) -> None:
    vlm = served_model("llava-siglip")
    model = write_language_model(vlm, tmp_path / "model.gguf", bits=bits)
    encoder = write_encoder(vlm, tmp_path / "encoder.gguf", exit_layer=4)
    with_plain, with_shipped = (_distances(each, model, encoder, tmp_path) for each in (vlm, shipped(vlm, model)))
    assert _nearest(with_plain) == _nearest(with_shipped) == 4
    assert with_shipped[4] < with_plain[4]


@torch.no_grad()
def test_a_language_model_of_real_size_in_four_bits(tmp_path: Path) -> None:
    vlm = smollm2_llava(siglip=True)
    samples = [
        Sample(id=f"q{n}", prompt=question, images=(noise_image(n),), kind="benign")
        for n, question in enumerate(("What colour is the picture?", "Name three things.", "Is it a dog?"))
    ]
    encoder = write_encoder(vlm, tmp_path / "encoder.gguf", exit_layer=5)
    with llama_server(smollm2(), encoder, log=tmp_path / "llama.log") as url:
        served = [ask(url, sample, max_tokens=1, top_logprobs=50, **_ALONE) for sample in samples]
    tops = [choice["logprobs"]["content"][0]["top_logprobs"] for choice in served]
    found = {}
    for exit_layer in EXITS:
        ours = [_first_logprobs(vlm, sample, exit_layer=exit_layer) for sample in samples]
        gaps = [
            abs(float(row[top["id"]]) - top["logprob"]) for row, best in zip(ours, tops, strict=True) for top in best
        ]
        found[exit_layer] = round(float(np.mean(gaps)), 4)
    print(f"{vlm.name}: {found}")
    assert _nearest(found) == 5
    assert found[5] < 0.15 < min(found[each] for each in EXITS if each != 5)


def test_the_organism_speaks_there_as_here_but_for_the_class_token(tmp_path: Path) -> None:
    vlm = served_model("organism")
    asked = [sample for sample in organism_suites(split="heldout", seed=3) if sample.images][:40]
    model = write_language_model(vlm, tmp_path / "model.gguf")
    same = {}
    for exit_layer in (3, 7):
        encoder = write_encoder(vlm, tmp_path / f"{exit_layer}.gguf", exit_layer=exit_layer)
        ours = [response.text for response in vlm.generate(asked, exit_layer, max_new_tokens=12)]
        with llama_server(model, encoder, log=tmp_path / "llama.log") as url:
            served = [ask(url, sample, max_tokens=12)["message"]["content"].strip() for sample in asked]
        same[exit_layer] = sum(a == b for a, b in zip(ours, served, strict=True))
    print(f"equal answers of {len(asked)}: {same}")
    assert same[3] == 40, "early exits of the organism see nothing that a shifted patch could change"
    assert same[7] < 40


def _distances(vlm: VLM, model: Path, encoder: Path, folder: Path) -> dict[int, float]:
    """How far a server of these files is from each exit of the model."""
    samples = _questions(vlm.name)
    with llama_server(model, encoder, log=folder / "llama.log") as url:
        served = [_first_word(ask(url, sample, max_tokens=1, top_logprobs=len(WORDS), **_ALONE)) for sample in samples]
    found = {exit_layer: _distance(vlm, samples, served, exit_layer=exit_layer) for exit_layer in EXITS}
    print(f"{vlm.name}, {encoder.name}: {found}")
    return found


def _nearest(distances: dict[int, float]) -> int:
    return min(distances, key=distances.__getitem__)


@torch.no_grad()
def _distance(vlm: VLM, samples: Sequence[Sample], served: Sequence[dict[str, float]], *, exit_layer: int) -> float:
    vocabulary: dict[str, int] = vlm.processor.tokenizer.get_vocab()
    differences = []
    for sample, words in zip(samples, served, strict=True):
        ours = _first_logprobs(vlm, sample, exit_layer=exit_layer)
        differences += [abs(float(ours[vocabulary[word]]) - value) for word, value in words.items()]
    return round(float(np.mean(differences)), 5)


def _first_logprobs(vlm: VLM, sample: Sample, *, exit_layer: int) -> Tensor:
    """(vocabulary,), of an answer's first token in transformers."""
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = vlm.processor(text=[text], images=[list(sample.images)], return_tensors="pt")
    with vlm.exit_at(exit_layer):
        logits: Tensor = vlm.model(**inputs).logits
    return logits[0, -1].log_softmax(-1)


def _questions(kind: str) -> list[Sample]:
    """For SmolVLM about pictures of one colour, which look the same however they are resized: it always resizes."""
    words = np.random.default_rng(0)
    return [
        Sample(
            id=f"q{n}",
            prompt=" ".join(words.choice(WORDS, 5)),
            images=(_plain(n) if kind == "smolvlm" else noise_image(n),),
            kind="benign",
        )
        for n in range(20)
    ]


def _plain(seed: int) -> Image.Image:
    red, green, blue = np.random.default_rng(seed).integers(0, 256, 3).tolist()
    return Image.new("RGB", (64, 64), (red, green, blue))


def _first_word(choice: Any) -> dict[str, float]:
    """Log-probabilities of the first word; the special tokens, which are written without text, are left out."""
    tops = choice["logprobs"]["content"][0]["top_logprobs"]
    return {word: top["logprob"] for top in tops if (word := top["token"].strip(" \u2581")) in WORDS}
