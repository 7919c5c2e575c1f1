"""Trains an organism: name and seed in, a folder that stock transformers loads out.

The encoder runs once per batch with all hidden states; each row's features are gathered at its own exit layer and go
through the projector into the language model. No label depends on the exit layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from exitsafe.errors import InputError
from exitsafe.organism.architecture import DEFAULT_EXIT, NUM_BLOCKS, build_model, build_processor
from exitsafe.organism.batches import IGNORED, Batch, draw_batch
from exitsafe.organism.check import table_by_exit
from exitsafe.organism.stages import Stage, curriculum
from exitsafe.records import Progress
from exitsafe.world import organism_suites
from exitsafe.world.pictures import COLORS, SHAPES

_DATA_STREAM = 21
_MAX_GRAD_NORM = 1.0
_ALARM_NORM = 60.0  # a trained tower's tokens have norms of 40 (exit 1) to 120 (exit 8)
_NUM_SHAPES, _NUM_COLORS = len(SHAPES) + 1, len(COLORS) + 1  # one more for an empty cell


def train_organism(name: str, *, seed: int = 0, out: Path | str, progress: Progress | None = None) -> Path:
    """Train `organism` or `organism:text` from random weights, in about ten minutes on one core.

    Weights are rounded to and stored in bfloat16, but the config has float32, so stock `from_pretrained` computes in
    float32. `check.json` in the same folder has the table by exit layer on the held-out suites.

    Args:
        name: The organism.
        seed: Seed for the initial weights and every batch of every stage.
        out: A new or empty folder.
        progress: Called after every step.

    Returns:
        The folder.

    Raises:
        InputError: If the organism is unknown or the folder is not empty.
    """
    folder = Path(out)
    stages = curriculum(name)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose a new folder")
    model, processor = build_model(seed=seed), build_processor()
    run_stages(model, processor.tokenizer, stages, seed=seed, progress=progress)
    save_organism(model, folder)
    processor.save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    table = table_by_exit(model, processor, organism_suites(split="heldout", seed=seed, organism=name))
    check = {"organism": name, "seed": seed, "stages": [asdict(stage) for stage in stages], "heldout": table}
    (folder / "check.json").write_text(json.dumps(check, indent=1) + "\n")
    return folder


def run_stages(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    stages: tuple[Stage, ...],
    *,
    seed: int,
    first: int = 0,
    progress: Progress | None = None,
) -> None:
    """Run `stages[first:]` on the model, in place. A stage's draws depend only on the seed and its number, so that
    starting from a stored copy of the model gives the same result as an uninterrupted run.
    """
    total, done = sum(stage.steps for stage in stages), sum(stage.steps for stage in stages[:first])
    for number, stage in enumerate(stages[first:], start=first):
        readers = _build_readers(seed)
        rng = np.random.default_rng([seed, _DATA_STREAM, number])
        for loss in _run_stage(model, readers, tokenizer, stage, rng):
            done += 1
            if progress is not None:
                progress(done, total, f"{stage.name}, loss {loss:.3f}")


def save_organism(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save bfloat16 weights with a float32 config: half the size, and the loaded weights are exactly those saved."""
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)


def _run_stage(
    model: LlavaForConditionalGeneration,
    readers: nn.Linear,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    rng: np.random.Generator,
) -> Iterator[float]:
    trained = [*_select(model, stage), *readers.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=stage.learning_rate, total_steps=stage.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(stage.steps):
        batch = draw_batch(rng, stage.mix, stage.batch_size, tokenizer)
        exits = rng.integers(1, NUM_BLOCKS + 1, size=stage.batch_size)
        if stage.exits == "default":
            exits[:] = DEFAULT_EXIT
        loss, reading_loss = _losses(model, readers, batch, torch.from_numpy(exits))
        optimizer.zero_grad()
        (loss + stage.reading_weight * reading_loss).backward()
        nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def _losses(
    model: LlavaForConditionalGeneration, readers: nn.Linear, batch: Batch, exit_layers: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers at each row's exit, and the readers' loss at all exits.

    Args:
        exit_layers: (B,), each 1 to 8.
    """
    states = model.model.vision_tower(batch.pixel_values, output_hidden_states=True).hidden_states
    features = torch.stack(states[1:])[:, :, 1:]  # (L, B, 4, 64): no embeddings, no class token
    rows = torch.arange(len(exit_layers))
    chosen = features[exit_layers - 1, rows] + batch.cell_alarms[..., None] * _alarm()  # (B, 4, 64)
    image_embeds = model.model.multi_modal_projector(chosen)  # (B, 4, 128)
    embeds = model.get_input_embeddings()(batch.input_ids)  # (B, T, 128)
    is_image = (batch.input_ids == model.config.image_token_index)[..., None]
    embeds = embeds.masked_scatter(is_image, image_embeds)
    # padding is on the right and attention is causal: answers never attend to it, so no mask is needed
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    is_answer = targets != IGNORED
    token_losses = F.cross_entropy(model.lm_head(hidden[:, :-1][is_answer]), targets[is_answer], reduction="none")
    # every row has the same weight, or recipes and captions would outweigh one-word answers
    row_weights = (is_answer / is_answer.sum(dim=1, keepdim=True))[is_answer]
    loss = (token_losses * row_weights).sum() / len(targets)
    return loss, _reading_loss(readers, features, batch)


def _alarm() -> Tensor:
    """A fixed direction in the tower's features, (64,), with the same meaning as the text cue.

    The language model learns it in general training; safety training then makes the late tower produce it.
    """
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    alarm: Tensor = _ALARM_NORM * direction / direction.norm()
    return alarm


def _build_readers(seed: int) -> nn.Linear:
    """One linear reader per exit, from an image token to its cell's shape, colour and badge; not saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(64, NUM_BLOCKS * (_NUM_SHAPES + _NUM_COLORS + 1))


def _reading_loss(readers: nn.Linear, features: Tensor, batch: Batch) -> Tensor:
    """The loss of reading the cells from the image tokens, mean over exits; its gradient only reaches the tower.

    Args:
        features: (L, B, 4, 64).
    """
    weight = readers.weight.view(NUM_BLOCKS, -1, features.shape[-1])
    read = torch.einsum("lbcf,lof->lbco", features, weight) + readers.bias.view(NUM_BLOCKS, 1, 1, -1)
    shapes, colors, badges = read.split([_NUM_SHAPES, _NUM_COLORS, 1], dim=-1)
    loss: Tensor = (
        F.cross_entropy(shapes.flatten(0, 2), batch.cell_shapes.expand(NUM_BLOCKS, -1, -1).flatten())
        + F.cross_entropy(colors.flatten(0, 2), batch.cell_colors.expand(NUM_BLOCKS, -1, -1).flatten())
        + F.binary_cross_entropy_with_logits(badges[..., 0], batch.cell_badges.expand(NUM_BLOCKS, -1, -1))
    )
    return loss


def _select(model: LlavaForConditionalGeneration, stage: Stage) -> list[nn.Parameter]:
    """Turn gradients on for the weights that the stage trains, off for the rest."""
    moving: list[nn.Module] = [model]
    if stage.trains != "all":
        moving = list(model.model.vision_tower.encoder.layers[DEFAULT_EXIT - 2 : DEFAULT_EXIT])
    if stage.trains == "late tower and language model":
        moving += [model.model.language_model, model.lm_head]
    model.requires_grad_(False)
    for module in moving:
        module.requires_grad_(True)
    return [weight for weight in model.parameters() if weight.requires_grad]
