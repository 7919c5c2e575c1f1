"""(a) Encoder time at exit l over the whole, against l / L. (b) All exits' features over one full pass.

A LLaVA with an encoder of CLIP ViT-L/14-336's width (12 of its 24 blocks, random weights) and a small language model.
(b) is measured twice: with a projector of the small width, where the encoder dominates, and with LLaVA-1.5's real
1024 -> 4096 -> 4096 projector, which has to run once per exit whoever computes it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.timing import best_seconds
from exitsafe.engine.vlm import VLM
from exitsafe.exits.checks import prove_exits

NUM_LAYERS = 12
WIDTH = 1024


def main() -> None:
    vlm = _wide_encoder()
    pixels = {"pixel_values": torch.randn(1, 3, 336, 336)}
    exits = (2, 4, 6, 8, 10, 12)

    def tower(exit_layer: int) -> object:
        with torch.no_grad(), vlm.exit_at(exit_layer):
            return vlm.base_model.model.vision_tower(pixels["pixel_values"])

    seconds = best_seconds({str(layer): lambda layer=layer: tower(layer) for layer in exits}, rounds=3)  # type: ignore[misc]
    print("(a) encoder time at exit l over all 12 blocks (goal: within 10% of l / 12)")
    for layer in exits:
        ratio, linear = seconds[str(layer)] / seconds[str(NUM_LAYERS)], layer / NUM_LAYERS
        print(f"    l={layer:2d}: {ratio:.3f}, linear {linear:.3f}, off by {ratio / linear - 1:+.1%}")

    for name, model in (("small projector", vlm), ("LLaVA-1.5's projector", _with_real_projector(vlm))):
        alternatives = {
            "all": lambda model=model: model.image_features(pixels, model.exit_layers),
            "full": lambda model=model: model.image_features(pixels, (model.num_layers,)),
            "one by one": lambda model=model: [model.image_features(pixels, (layer,)) for layer in model.exit_layers],
        }
        seconds = best_seconds(alternatives, rounds=3)
        print(
            f"(b) all {NUM_LAYERS} exits over one full pass, {name}: {seconds['all'] / seconds['full']:.2f} "
            f"(exit by exit: {seconds['one by one'] / seconds['full']:.2f}; goal <= 1.15)"
        )


def _wide_encoder() -> VLM:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    inputs = {"pixel_values": torch.randn(1, 3, 336, 336)}
    encoder = prove_exits(model.eval(), inputs, modality="image", name="wide encoder")
    return VLM(model, None, encoder=encoder, name="wide encoder")


def _with_real_projector(vlm: VLM) -> VLM:
    model: Any = copy.deepcopy(vlm.model)
    projector = model.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = nn.Linear(WIDTH, 4096), nn.Linear(4096, 4096)
    return VLM(model, None, encoder=vlm.encoder, name="wide encoder and projector")


if __name__ == "__main__":
    main()
