"""The self-check of a model: its exits, and that our generation loop computes what transformers' `generate` computes.

It runs once per checkpoint: the result is kept next to the Hub cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import constants
from pydantic import TypeAdapter
from torch import Tensor
from transformers import GenerationConfig

from exitsafe.engine.prompts import Prompt, Row
from exitsafe.errors import ModelError, first_line
from exitsafe.exits.checks import Checks
from exitsafe.exits.features import on_device
from exitsafe.exits.finite import check_finite
from exitsafe.version import __version__

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.huggingface import MultimodalModel

_NUM_TOKENS = 3
_ALONE = 1e-5  # the same operations on the same numbers: more is another computation


def run_checks(vlm: VLM, *, since: float) -> Checks:
    """Prove that our loop and training compute what `generate` computes, at the default exit and one other.

    Args:
        vlm: The model, its encoder found.
        since: `time.perf_counter()` when the check began with the encoder.

    Raises:
        ModelError: If the logits differ, or our loop cannot run the model.
    """
    exits = (vlm.default_exit, (vlm.default_exit + 1) // 2)
    prompts = [vlm.probe(), vlm.probe(text="what is in it, and what is not")]
    epsilon = torch.finfo(vlm.base_model.dtype).eps
    four_bit = [module for module in vlm.model.modules() if type(module).__name__ == "Linear4bit"]
    for module in four_bit:  # in evaluation mode a CPU repacks their weights, through which no gradient flows
        module.training = True
    try:
        asked = [_Asked.of(vlm, prompt, exit_layer) for prompt, exit_layer in zip(prompts, exits, strict=True)]
        alone = max(_difference(_own(vlm, [each])[0], each.logits) for each in asked)
        _refuse(vlm, "generation", alone, most=max(_ALONE, epsilon))
        mixed = _mixed(vlm, asked)
        if not mixed <= epsilon**0.5:  # padding on the left changes what this model computes
            vlm.can_pad = False
            asked = [_Asked.of(vlm, prompts[0], exit_layer) for exit_layer in exits]
            mixed = _mixed(vlm, asked)
        _refuse(vlm, "mixed batches", mixed, most=epsilon**0.5)
        training = max(_difference(_trained_on(vlm, each), each.logits) for each in asked)
        _refuse(vlm, "training", training, most=epsilon**0.5)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{vlm.name} fails the check of generation: exitsafe's loop cannot run it ({type(error).__name__}: "
            f"{first_line(error)}); exitsafe cannot be used with this model"
        ) from error
    finally:
        for module in four_bit:
            module.training = False
    return Checks(
        encoder=vlm.encoder,
        exits=exits,
        alone=alone,
        mixed=mixed,
        training=training,
        can_pad=vlm.can_pad,
        seconds=round(time.perf_counter() - since, 2),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A row, and what transformers' `generate` answers to it: tokens (T,) and their logits (T, V)."""

    row: Row
    tokens: Tensor
    logits: Tensor

    @classmethod
    def of(cls, vlm: VLM, prompt: Prompt, exit_layer: int) -> _Asked:
        tokens, logits = _stock(vlm, prompt, exit_layer)
        features = vlm.prompt_features([prompt], [exit_layer])[0][exit_layer]
        row = Row(prompt=prompt, exit_layer=exit_layer, features=features)
        check_finite(logits[None], [row], what="logits", dtype=vlm.base_model.dtype)
        return cls(row=row, tokens=tokens, logits=logits)


def _refuse(vlm: VLM, check: str, value: float, *, most: float) -> None:
    if not value <= most:
        raise ModelError(
            f"{vlm.name} fails the check of {check}: logits differ from those of transformers' generate by "
            f"{value:.2g} of their size; exitsafe cannot be used with this model"
        )


def _mixed(vlm: VLM, asked: Sequence[_Asked]) -> float:
    found = _own(vlm, asked)
    return max(_difference(logits, each.logits) for logits, each in zip(found, asked, strict=True))


def difference_from_generate(vlm: VLM, prompt: Prompt, exit_layer: int) -> float:
    """How far our loop's logits are from those of transformers' `generate` at an exit, relative to their size."""
    asked = _Asked.of(vlm, prompt, exit_layer)
    return _difference(_own(vlm, [asked])[0], asked.logits)


def kept_checks(key: str, model: MultimodalModel) -> Checks | None:
    """The result of an earlier check of this model; None if there is none, or the file is damaged."""
    with suppress(OSError, ValueError, AttributeError):  # unreadable, not as written, or about other blocks
        found = TypeAdapter(Checks).validate_json(_place(key).read_bytes(), strict=True)
        encoder = found.encoder
        num_blocks = len(list(model.get_submodule(encoder.path).children()))
        if num_blocks == encoder.num_layers and 1 <= encoder.default_exit <= num_blocks:
            return found
    return None


def keep_checks(key: str, checks: Checks) -> None:
    """Keep a result for the next time; a cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(checks), indent=1) + "\n")
        part.replace(place)


def checks_key(checkpoint_hash: str | None, **settings: str | None) -> str:
    """A hash of all that decides the result of a check: weights, code, and how they are loaded."""
    versions = __version__, transformers.__version__, str(torch.__version__)
    deciding = [checkpoint_hash, *versions, sorted(settings.items())]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def _place(key: str) -> Path:
    return Path(constants.HF_HOME) / "exitsafe" / "checks" / f"{key}.json"


@torch.no_grad()
def _stock(vlm: VLM, prompt: Prompt, exit_layer: int) -> tuple[Tensor, Tensor]:
    """The tokens (T,) that transformers' `generate` answers inside an exit, and their logits (T, V)."""
    model = vlm.base_model
    text = {name: tensor[None].to(vlm.device) for name, tensor in prompt.text_inputs.items()}
    tokens = prompt.input_ids[None].to(vlm.device)
    never = [*vlm.eos_token_ids, *vlm.special_token_ids] or None  # without an end, both make as many tokens
    plain = GenerationConfig(pad_token_id=vlm.pad_token_id, suppress_tokens=never)
    before, model.generation_config = model.generation_config, plain
    try:
        with vlm.exit_at(exit_layer):
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                **text,
                **on_device(model, prompt.media),
                max_new_tokens=_NUM_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        model.generation_config = before
    return found.sequences[0, -_NUM_TOKENS:], torch.stack([logits[0] for logits in found.logits])


def _own(vlm: VLM, asked: Sequence[_Asked]) -> list[Tensor]:
    """Our loop's logits for each row, (T, V), all in one batch."""
    rows = [each.row for each in asked]
    steps: list[Tensor] = []
    recorder = vlm.base_model.register_forward_hook(lambda module, args, output: steps.append(output.logits[:, -1]))
    try:
        answers = vlm.complete(
            rows,
            max_new_tokens=_NUM_TOKENS,
            temperature=0.0,
            seed=0,
            batch_size=len(rows),
            suppress=[*vlm.eos_token_ids, *vlm.special_token_ids],
        )
        _ = list(answers)
    finally:
        recorder.remove()
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt.input_ids))
    logits = torch.stack(steps, dim=1)  # (B, T, V)
    return [logits[order.index(index)] for index in range(len(rows))]


@torch.no_grad()
def _trained_on(vlm: VLM, asked: _Asked) -> Tensor:
    hidden, _, _ = vlm.response_states([asked.row], [asked.tokens])
    return vlm.logits(hidden)[0]


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
