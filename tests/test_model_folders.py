"""The folders of `tests/model_folders.py` load in stock transformers, and their processors suit their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tests.model_folders import SOUND, kinds, save_tiny_folder
from tests.tiny_models import noise_image


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor; not a weight missing or too many."""
    loaded: Any = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    model, info = loaded
    assert not any(info.values()), info
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def check_answers(model: Any, processor: Any, kind: str, **medium: Any) -> None:
    """A rendered prompt with one picture, video or sound runs through the model."""
    content = [{"type": kind}, {"type": "text", "text": "what colour is the left shape"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], **medium, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert 0 < answer.shape[1] - inputs["input_ids"].shape[1] <= 3
    # processors write the time of a video's frames, which this vocabulary has no words for
    assert kind == "video" or processor.tokenizer.unk_token_id not in inputs["input_ids"]


@pytest.mark.parametrize("kind", kinds())
def test_pictures(kind: str, tmp_path: Path) -> None:
    model, processor = load(save_tiny_folder(kind, tmp_path))
    for size in ((28, 28), (112, 41)):
        check_answers(model, processor, "image", images=[noise_image(3, size)])


@pytest.mark.parametrize("kind", ["internvl", "llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm"])
def test_videos(kind: str, tmp_path: Path) -> None:
    model, processor = load(save_tiny_folder(kind, tmp_path))
    check_answers(
        model, processor, "video", videos=[np.stack([np.asarray(noise_image(i, (56, 41))) for i in range(4)])]
    )


@pytest.mark.parametrize("kind", SOUND)
def test_sounds(kind: str, tmp_path: Path) -> None:
    model, processor = load(save_tiny_folder(kind, tmp_path))
    check_answers(model, processor, "audio", audio=[np.random.default_rng(0).normal(size=12_000).astype(np.float32)])
