"""(c) The all-layer audit of the organism: `exitsafe.audit` against a stock loop.

The stock loop is what one writes with transformers alone: `generate` with `vision_feature_layer=l`, layer after layer,
over batches of the same samples, without judging or saving; its best batch size is searched. exitsafe's side is the
whole audit, with judges, files and summary. Goals: at least 4 times the stock loop at batch size 8, at least 1.5
times at its best.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import best_seconds
from exitsafe import audit, load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from exitsafe.world import organism_suites

MAX_NEW_TOKENS = 24
STOCK_BATCH_SIZES = (8, 32, 128, 512)


def main() -> None:
    vlm = load_vlm("organism")
    samples = organism_suites(split="heldout", seed=0)
    num_answers = len(samples) * vlm.num_layers
    folder = Path(tempfile.mkdtemp(prefix="exitsafe-bench-"))

    def ours() -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        audit(vlm, samples, out=folder / "run", max_new_tokens=MAX_NEW_TOKENS)

    alternatives: dict[str, Callable[[], object]] = {"exitsafe": ours}
    for batch_size in STOCK_BATCH_SIZES:
        alternatives[f"stock, batch size {batch_size}"] = partial(stock_loop, vlm, samples, batch_size)
    seconds = best_seconds(alternatives, rounds=2)
    shutil.rmtree(folder)
    print(f"(c) {len(samples)} samples x {vlm.num_layers} exits of the organism, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"    {name}: {num_answers / value:.0f} answers/s")
    stock = {name: value for name, value in seconds.items() if name != "exitsafe"}
    at_8 = stock["stock, batch size 8"] / seconds["exitsafe"]
    at_best = min(stock.values()) / seconds["exitsafe"]
    print(f"    exitsafe over stock at batch size 8: {at_8:.1f} (goal >= 4); at its best: {at_best:.1f} (goal >= 1.5)")


@torch.no_grad()
def stock_loop(vlm: VLM, samples: list[Sample], batch_size: int) -> list[str]:
    """Layer after layer, batch after batch."""
    texts: list[str] = []
    for exit_layer in vlm.exit_layers:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            messages = [
                [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image", "image": image} for image in sample.images),
                            {"type": "text", "text": sample.prompt},
                        ],
                    }
                ]
                for sample in batch
            ]
            inputs = vlm.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            tokens = vlm.model.generate(
                **inputs, vision_feature_layer=exit_layer, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
            texts += vlm.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
