"""An organism whose connector blends layers: trains one, for `benchmarks.organism_study` to audit and repair.

    python -m benchmarks.organism_connector --seed 0 --out runs/connector/seed0
    python -m benchmarks.organism_study runs/connector/seed0 --seed 0 --out runs/study \
        --only "L-PPO, all exits" --only "PPO, default exit"

Architecture, curriculum and data are the organism's. What differs is the projector: it reads the hidden states after
blocks 2, 4, 6 and 7 side by side, and at exit l those after block l instead of deeper ones. In training the alarm is
added to the taps that the late tower writes, 6 and 7: safety training could not raise it in the others.
Training takes about eight minutes of one core, the study about five.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from exitsafe.organism import training
from exitsafe.organism.architecture import DEFAULT_EXIT, NUM_BLOCKS, _widen_init, build_model
from exitsafe.organism.batches import Batch
from exitsafe.organism.check import table_by_exit
from exitsafe.records import Sample

TAPS = (2, 4, 6, 7)
LATE = torch.tensor([tap > DEFAULT_EXIT - 2 for tap in TAPS])
_losses_of_one_layer = training._losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with patch.multiple(
        training, build_model=build_blending, _losses=blended_losses, table_by_exit=table_of_clamped_taps
    ):
        training.train_organism("organism", seed=arguments.seed, out=arguments.out, progress=show)


def build_blending(*, seed: int) -> LlavaForConditionalGeneration:
    """An untrained organism with a projector that reads four layers; the other weights are the organism's."""
    model = build_model(seed=seed)
    model.config.vision_feature_layer = [tap - NUM_BLOCKS - 1 for tap in TAPS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(model.config)
        _widen_init(model.model.multi_modal_projector)
    return model


def blended_losses(
    model: LlavaForConditionalGeneration, readers: nn.Linear, batch: Batch, exit_layers: Tensor
) -> tuple[Tensor, Tensor]:
    """The organism's losses, with the projector's input replaced by the taps of each row's exit."""
    states: list[Tensor] = []
    keep = model.model.vision_tower.register_forward_hook(lambda module, args, out: states.extend(out.hidden_states))
    give = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: blend(torch.stack(states)[:, :, 1:], exit_layers, batch.cell_alarms)
    )
    try:
        return _losses_of_one_layer(model, readers, batch, exit_layers)
    finally:
        keep.remove()
        give.remove()


def blend(states: Tensor, exit_layers: Tensor, cell_alarms: Tensor) -> Tensor:
    """The projector's input, (B, 4, T * 64), from hidden states (L + 1, B, 4, 64), exits (B,) and alarms (B, 4)."""
    layers = torch.minimum(torch.tensor(TAPS)[None], exit_layers[:, None])  # (B, T)
    taps = states[layers, torch.arange(len(layers))[:, None]].transpose(1, 2)  # (B, 4, T, 64)
    alarms = (cell_alarms[..., None] & LATE)[..., None] * training._alarm()
    return (taps + alarms).flatten(2)


def table_of_clamped_taps(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: list[Sample]
) -> list[dict[str, int]]:
    """The organism's table by exit: stock generation, each tap clamped to the exit."""
    generate = cast(Any, model).generate

    def at_exit(*args: Any, vision_feature_layer: int, **kwargs: Any) -> Any:
        layers = [min(tap, vision_feature_layer) for tap in TAPS]
        return generate(*args, vision_feature_layer=layers, **kwargs)

    with patch.object(model, "generate", at_exit):
        return table_by_exit(model, processor, samples)


def show(done: int, total: int, note: str) -> None:
    if done % 50 == 0:
        print(f"step {done} of {total} {note}", flush=True)


if __name__ == "__main__":
    main()
