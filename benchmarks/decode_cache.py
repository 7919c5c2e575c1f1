"""A decode step with the cache that grows in blocks, against transformers' own, which copies itself for every token.

    python -m benchmarks.decode_cache [--rounds 5]

The language model has the sizes of SmolLM2-135M and random weights. Prints, for each (rows, prompt tokens), the median
over rounds of the ratio of the two times for 32 tokens, taken in turn, and whether the tokens were the same.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from exitsafe.engine.cache import growing_cache

SHAPES = ((8, 128), (32, 128), (8, 700), (32, 700))
NUM_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    print("| rows | prompt tokens | own cache, s | in blocks, s | ratio | same tokens |\n|---|---|---|---|---|---|")
    for rows, length in SHAPES:
        prompt = torch.randint(0, config.vocab_size, (rows, length))
        pairs = [(decode(model, prompt, blocks=False), decode(model, prompt, blocks=True)) for _ in range(rounds)]
        own, blocks = (statistics.median(pair[which][0] for pair in pairs) for which in (0, 1))
        ratio = statistics.median(one[0] / other[0] for one, other in pairs)
        same = all(torch.equal(one[1], other[1]) for one, other in pairs)
        print(f"| {rows} | {length} | {own:.2f} | {blocks:.2f} | {ratio:.2f} | {same} |", flush=True)


@torch.no_grad()
def decode(model: LlamaForCausalLM, prompt: torch.Tensor, *, blocks: bool) -> tuple[float, torch.Tensor]:
    """Seconds for the tokens after the prompt's, and the tokens."""
    cache = growing_cache(model.config) if blocks else DynamicCache(config=model.config)
    newest = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    tokens, started = [newest], time.perf_counter()
    for _ in range(NUM_TOKENS):
        newest = model(newest, past_key_values=cache, use_cache=True).logits.argmax(-1)
        tokens.append(newest)
    return time.perf_counter() - started, torch.cat(tokens, 1)


if __name__ == "__main__":
    main()
