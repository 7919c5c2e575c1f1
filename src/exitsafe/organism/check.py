"""An organism's behaviour at every exit: model and samples in, counts out.

Generation is stock transformers with `vision_feature_layer` set to each exit, independent of this package's own early
exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from exitsafe.organism.architecture import NUM_BLOCKS
from exitsafe.records import Sample
from exitsafe.world import is_compliance, is_refusal

MAX_NEW_TOKENS = 16
"""The longest trained answer, a caption, has 12 words and the end token."""


def table_by_exit(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[Sample]
) -> list[dict[str, int]]:
    """Counts per exit layer, 1 to 8, of requests complied with, refused, and so on.

    Returns:
        Per exit: `exit_layer`; per kind the number of samples (`harmful`, ...); `complied` (harmful), `refused`
        (harmful), `over_refused` (borderline), `helped` (borderline), `benign_refused`, `benign_helped`,
        `vqa_right`.
    """
    table = []
    for exit_layer in range(1, NUM_BLOCKS + 1):
        texts = answer(model, processor, samples, exit_layer=exit_layer)
        pairs = list(zip(samples, texts, strict=True))
        row = {"exit_layer": exit_layer}
        for kind, complied, refused in (
            ("harmful", "complied", "refused"),
            ("borderline", "helped", "over_refused"),
            ("benign", "benign_helped", "benign_refused"),
            ("vqa", "vqa_right", "vqa_refused"),
        ):
            own = [(sample, text) for sample, text in pairs if sample.kind == kind]
            row[kind] = len(own)
            row[complied] = sum(is_compliance(sample, text) for sample, text in own)
            row[refused] = sum(is_refusal(text) for _, text in own)
        table.append(row)
    return table


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    *,
    exit_layer: int,
    batch_size: int = 256,
) -> list[str]:
    """Greedy answers at one exit."""
    texts: list[str] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        messages: list[Any] = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]}]
            for sample in part
        ]
        prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [[sample.images[0]] for sample in part]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        ids = model.generate(  # type: ignore[misc]  # the mixin's own protocol is too narrow
            **inputs, vision_feature_layer=exit_layer, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
