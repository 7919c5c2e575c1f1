"""The folders of `tests/model_folders.py` load in stock transformers, and their processors suit their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.model_folders import kinds, save_tiny_folder
from tests.tiny_models import noise_image


@pytest.mark.parametrize("kind", kinds())
def test_processor_and_model_fit(kind: str, tmp_path: Path) -> None:
    folder = save_tiny_folder(kind, tmp_path)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    model, info = loaded
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    for size in ((28, 28), (112, 41)):
        content = [{"type": "image"}, {"type": "text", "text": "what colour is the left shape"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[noise_image(3, size)], return_tensors="pt")
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
            answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        num_new = answer.shape[1] - inputs["input_ids"].shape[1]
        assert 0 < num_new <= 3
        assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
