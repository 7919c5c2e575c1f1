"""(e) Floating-point operations of an update with the answers of a group packed, over those of separate sequences.

Measured by torch's counter over `Learner.update`: forward and backward of clipped policy and value losses on LoRA
weights. Attention is counted in full, masked or not: packed, it runs over the whole square (eager attention, whose
products the counter sees on every device).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.long_prompt import long_prompt_vlm, picture_questions
from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.features import FeatureStore
from exitsafe.lppo.logprobs import measure
from exitsafe.lppo.minibatches import deal
from exitsafe.lppo.policy import attached_policy
from exitsafe.lppo.update import Experience, Learner

NUM_PROMPTS, GROUP_SIZE, RESPONSE_TOKENS = 2, 4, 100


def main() -> None:
    vlm = long_prompt_vlm(width=512, num_layers=2)
    vlm.model.set_attn_implementation("eager")
    packed, separate = (update_flops(vlm, pack=pack) for pack in (True, False))
    prompt_tokens = len(vlm.encode_prompt(picture_questions(1)[0]).input_ids)
    tokens = (prompt_tokens + GROUP_SIZE * RESPONSE_TOKENS) / (GROUP_SIZE * (prompt_tokens + RESPONSE_TOKENS))
    print(
        f"(e) update of {NUM_PROMPTS} x {GROUP_SIZE} answers of {RESPONSE_TOKENS} tokens to prompts of "
        f"{prompt_tokens}: packed {packed / 1e9:.0f} GFLOP, separate {separate / 1e9:.0f}, "
        f"ratio {packed / separate:.3f} (goal <= 0.45; tokens alone: {tokens:.3f})"
    )


def update_flops(vlm: VLM, *, pack: bool) -> int:
    """Of one epoch over one batch."""
    config = LPPOConfig(
        num_epochs=1,
        batch_size=NUM_PROMPTS * GROUP_SIZE,
        minibatch_size=NUM_PROMPTS * GROUP_SIZE,
        group_size=GROUP_SIZE,
        microbatch_tokens=2800,
    )
    samples = picture_questions(NUM_PROMPTS)
    places = [index for index in range(NUM_PROMPTS) for _ in range(GROUP_SIZE)]
    rows = FeatureStore(vlm, samples, (2, 3), max_bytes=1e9).rows(places, [2 + index % 2 for index in places])
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(9, vlm.text_config.vocab_size, (RESPONSE_TOKENS,), generator=generator) for _ in rows]
    with attached_policy(vlm, config) as policy:
        if not pack:
            policy.pack_size = 1
        batch = deal(vlm, rows, responses, config=config, rng=np.random.default_rng(0))
        measured = measure(policy, batch)
        learner = Learner(policy, config)
        # what the tokens are worth costs no pass
        experience = Experience(batch=batch, measured=measured, advantages=measured.logprobs, returns=measured.values)
        with FlopCounterMode(display=False) as counter:
            learner.update(experience, train_policy=True, rng=np.random.default_rng(0))
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main()
