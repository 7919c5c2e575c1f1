"""The organism's body: stock classes, the processor agrees with what training feeds, the seed decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from exitsafe.organism.architecture import DEFAULT_EXIT, NUM_BLOCKS, build_model, build_processor
from exitsafe.organism.batches import IGNORED, Mix, draw_batch, normalised
from exitsafe.world import organism_suites
from exitsafe.world.language import vocabulary


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


def encode(processor: LlavaProcessor, prompt: str, picture: Image.Image) -> dict[str, torch.Tensor]:
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(text=text, images=picture, return_tensors="pt"))


def test_size_exits_and_special_tokens() -> None:
    model = build_model(seed=0)
    assert sum(weight.numel() for weight in model.parameters()) < 1_100_000
    assert len(model.model.vision_tower.encoder.layers) == NUM_BLOCKS == 8
    assert model.config.vision_feature_layer == -2
    assert DEFAULT_EXIT == 7
    settings = model.generation_config
    assert len({settings.pad_token_id, settings.bos_token_id, settings.eos_token_id}) == 3


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build_model(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_word_is_one_token_and_comes_back(processor: LlavaProcessor) -> None:
    text = " ".join(vocabulary())
    ids = processor.tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(vocabulary())
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer("Tell me, what?")["input_ids"] == processor.tokenizer("tell me , what ?")["input_ids"]


def test_chat_template_expands_the_picture_to_four_tokens(processor: LlavaProcessor) -> None:
    sample = organism_suites(split="train")[0]
    inputs = encode(processor, sample.prompt, sample.images[0])  # type: ignore[arg-type]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    said = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert said == f"user : {sample.prompt} assistant :"


def test_training_rows_are_what_the_processor_makes(processor: LlavaProcessor) -> None:
    """Same token ids and the same pixels, so that training and use see one and the same model."""
    batch = draw_batch(np.random.default_rng(0), Mix(question=0.5, guarded=0.5), 8, processor.tokenizer)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        prompt = ids[: int((labels != IGNORED).nonzero()[0])]
        words = processor.tokenizer.decode(prompt, skip_special_tokens=True)
        asked = words.removeprefix("user : ").removesuffix(" assistant :")
        inputs = encode(processor, asked, Image.new("RGB", (32, 32)))
        assert inputs["input_ids"][0].tolist() == prompt.tolist()
    picture = np.random.default_rng(1).integers(0, 256, size=(1, 32, 32, 3), dtype=np.uint8)
    inputs = encode(processor, "describe the picture .", Image.fromarray(picture[0]))
    torch.testing.assert_close(inputs["pixel_values"], normalised(picture), atol=1e-6, rtol=0)


def test_processor_survives_saving(processor: LlavaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    sample = organism_suites(split="train")[0]
    first, second = (encode(p, sample.prompt, sample.images[0]) for p in (processor, again))  # type: ignore[arg-type]
    assert type(again) is LlavaProcessor
    assert again.tokenizer.padding_side == "left"
    assert first.keys() == second.keys()
    # where torchvision is installed AutoProcessor takes its image processor, which rounds in another order
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
