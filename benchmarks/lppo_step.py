"""(d) Samples per second of a whole L-PPO step against TRL's GRPOTrainer, which has no critic and no exits.

The same small LLaVA with 576 image tokens, the same prompts, answers per prompt, answer length (nothing ends early),
LoRA, optimiser steps, epochs and KL to a reference; one process, the same threads. L-PPO's step is rollout, reward,
policy, reference and value passes, and the update of policy and critic; its encoder passes are inside the step, as
when features do not fit the cache. TRL's is all of its optimiser steps on one batch of rollouts. Wall and CPU seconds
are printed: other load on the machine moves the first only.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.long_prompt import long_prompt_vlm, picture_questions
from exitsafe import align
from exitsafe.engine.vlm import VLM
from exitsafe.lppo import LPPOConfig
from exitsafe.records import Response, Sample

NUM_PROMPTS, GROUP_SIZE, ANSWER_TOKENS = 4, 4, 48
BATCH = NUM_PROMPTS * GROUP_SIZE
MINIBATCH, NUM_EPOCHS, KL_COEF = 8, 2, 0.05
NUM_STEPS = 3  # the first is a warm-up


def main() -> None:
    if find_spec("trl") is None:
        print('(d) L-PPO step against TRL: needs TRL; pip install -c constraints.txt "trl==1.16.*"')
        return
    trl: Any = import_module("trl")
    samples = picture_questions(NUM_PROMPTS)
    ours = lppo_seconds(long_prompt_vlm(width=128, num_layers=4), samples)
    theirs = grpo_seconds(long_prompt_vlm(width=128, num_layers=4), samples)
    num_prompt = len(long_prompt_vlm(width=128, num_layers=4).encode_prompt(samples[0]).input_ids)
    print(
        f"(d) {NUM_PROMPTS} prompts of {num_prompt} tokens x {GROUP_SIZE} answers of {ANSWER_TOKENS}, "
        f"{NUM_EPOCHS} epochs of {BATCH // MINIBATCH} optimiser steps, {torch.get_num_threads()} threads"
    )
    for name, (wall, cpu) in (("L-PPO, with critic", ours), (f"TRL {trl.__version__} GRPO, no critic", theirs)):
        print(f"    {name}: {BATCH / wall:.2f} samples/s ({wall:.2f} s a step, {cpu:.2f} s of CPU)")
    print(f"    L-PPO over GRPO: {theirs[0] / ours[0]:.2f} (CPU: {theirs[1] / ours[1]:.2f}; goal >= 2)")


class Laps:
    """Wall and CPU seconds between calls."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def __call__(self, *_: object) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def best(self) -> tuple[float, float]:
        """The least of each over all laps."""
        laps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self._marks)]
        return min(wall for wall, _ in laps), min(cpu for _, cpu in laps)


def lppo_seconds(vlm: VLM, samples: Sequence[Sample]) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest step behind the first."""
    config = LPPOConfig(
        num_steps=NUM_STEPS,
        batch_size=BATCH,
        group_size=GROUP_SIZE,
        minibatch_size=MINIBATCH,
        num_epochs=NUM_EPOCHS,
        max_new_tokens=ANSWER_TOKENS,
        kl_coef=KL_COEF,
        value_warmup_steps=0,
        feature_cache_gb=0.0,
        checkpoint_every=NUM_STEPS,
    )

    def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        assert all(response.num_tokens == ANSWER_TOKENS for response in responses)
        return [_count_red(response.text) for response in responses]

    laps = Laps()
    with tempfile.TemporaryDirectory(prefix="exitsafe-bench-") as folder:
        align(vlm, samples, reward=reward, config=config, out=Path(folder) / "run", progress=laps)
    return laps.best()


def grpo_seconds(vlm: VLM, samples: Sequence[Sample]) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest round behind the first: one generation, and all optimiser steps on it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    trl: Any = import_module("trl")
    per_round = NUM_EPOCHS * BATCH // MINIBATCH
    laps = Laps()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % per_round == 0:
                laps()

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [_count_red(completion[0]["content"]) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": sample.prompt}], "image": sample.images[0]} for sample in samples]
    with tempfile.TemporaryDirectory(prefix="exitsafe-bench-") as folder:
        trainer = trl.GRPOTrainer(
            model=vlm.model,
            reward_funcs=reward,
            processing_class=vlm.processor,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=vlm.linear_layers),
            callbacks=[Clock()],
            args=trl.GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=MINIBATCH,
                steps_per_generation=BATCH // MINIBATCH,
                num_generations=GROUP_SIZE,
                num_iterations=NUM_EPOCHS,
                max_steps=NUM_STEPS * per_round,
                max_completion_length=ANSWER_TOKENS,
                generation_kwargs={"min_new_tokens": ANSWER_TOKENS},
                beta=KL_COEF,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1000,
            ),
        )
        trainer.train()
    return laps.best()


def _count_red(text: str) -> float:
    return float(text.split().count("red"))


if __name__ == "__main__":
    main()
