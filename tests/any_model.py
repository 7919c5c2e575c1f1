"""What exitsafe makes of an architecture: a model type in, whether its exits are found, proven and exported out.

Models are tiny and random (`tests.architectures`). Real processors are tested elsewhere: a stand-in hands out inputs of
the right shapes.

`python -m tests.any_model > docs/models.md` rewrites the table of models in the documentation: 8 CPU minutes.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from exitsafe.engine.checks import difference_from_generate, run_checks
from exitsafe.engine.load import auto_class
from exitsafe.engine.prompts import TEXT_INPUTS, Prompt
from exitsafe.engine.reader import PROBE_SIZE
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitsafeError, first_line
from exitsafe.exporting.checkpoint import cut, save
from tests.architectures import Tiny, model_types, tiny, tiny_inputs


class _Tokenizer:
    all_special_ids: tuple[int, ...] = ()
    pad_token_id = 0
    eos_token_id = None


class _Processor:
    """Stands in for a processor: `StandIn` makes its prompts itself."""

    tokenizer = _Tokenizer()
    chat_template = None

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


class StandIn(VLM):
    """A `VLM` of a tiny model, whose prompts come from `tests.architectures` instead of a processor."""

    def __init__(self, tiny_model: Tiny, *, name: str, modality: str = "image") -> None:
        self._tiny = tiny_model
        super().__init__(tiny_model.model, _Processor(), name=name, modality=modality)

    def probe(
        self, modality: str | None = None, *, size: tuple[int, int] = PROBE_SIZE, text: str = "a picture"
    ) -> Prompt:
        made = tiny_inputs(
            self._tiny.model, seed=len(text), num_words=3 + len(text) // 8, modality=modality or self.encoder.modality
        )
        return Prompt(
            sample_id="probe",
            input_ids=made["input_ids"][0],
            text_inputs={name: made[name][0] for name in TEXT_INPUTS if name in made},
            media={
                name: value for name, value in made.items() if name not in (*TEXT_INPUTS, "input_ids", "attention_mask")
            },
        )


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What was found. `refusal` is exitsafe's own message; `exported` the largest difference of a reloaded export."""

    model_type: str
    modality: str
    refusal: str = ""
    blocks: str = ""
    num_layers: int = 0
    default_exit: int = 0
    is_sliced: bool = False
    can_pad: bool = True
    alone: float = float("nan")
    exported: float = float("nan")
    export_problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether every check and the export succeeded."""
        return not self.refusal and self.exported == 0.0


def examine(model_type: str, modality: str = "image") -> Examined:
    """Find, prove and export the exits of a tiny model.

    Raises:
        LookupError: If the architecture has no feature path for this modality.
        Exception: Whatever transformers raises where it cannot build or run the tiny model.
    """
    made = tiny(model_type, modality=modality)
    try:
        vlm = StandIn(made, name=model_type, modality=modality)
        run_checks(vlm, since=time.perf_counter())
        prompt, exits = vlm.probe(), sorted({1, 3, vlm.default_exit})
        alone = max(difference_from_generate(vlm, prompt, exit_layer) for exit_layer in exits)
    except ExitsafeError as error:
        return Examined(model_type=model_type, modality=modality, refusal=str(error))
    exported, problem = float("nan"), ""
    try:
        exported = max(_exported(vlm, made, exit_layer) for exit_layer in (2, 4))
    except ExitsafeError as error:
        problem = str(error)
    return Examined(
        model_type=model_type,
        modality=modality,
        blocks=vlm.encoder.path,
        num_layers=vlm.num_layers,
        default_exit=vlm.default_exit,
        is_sliced=vlm.encoder.is_sliced,
        can_pad=vlm.can_pad,
        alone=alone,
        exported=exported,
        export_problem=problem,
    )


@torch.no_grad()
def _exported(vlm: StandIn, made: Tiny, exit_layer: int) -> float:
    """The largest difference of logits between an exit and its export, reloaded strictly in stock transformers."""
    with TemporaryDirectory() as folder:
        slim = cut(vlm, exit_layer=exit_layer, skip_global=False, keep_adapter=False)
        save(slim, Path(folder))
        loaded: Any = auto_class(made.model.config).from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    if any(info.values()):
        return float("inf")
    with vlm.exit_at(exit_layer):
        wanted = made.model(**made.inputs, use_cache=False).logits
    return float((model.eval()(**made.inputs, use_cache=False).logits - wanted).abs().max())


def _page(found: Iterable[Examined], failed: dict[str, str]) -> Iterable[str]:
    rows = sorted(found, key=lambda each: (each.modality, each.model_type))
    passed = [row for row in rows if row.passes]
    yield f"""# Which models work

Any vision-language model whose exits can be proven. exitsafe has no table of families: it finds a model's encoder by
running it once, and checks at load that its exits, its answers and its training compute what transformers computes.
`exitsafe doctor MODEL` checks what can be checked without the weights; the rest is checked when they are first loaded,
once per checkpoint.

The table is the result of these checks on tiny models with random weights, of every architecture that transformers
{transformers.__version__} registers for images (or audio) and text, on {date.today().isoformat()}.
An encoder passes if it was found, its exits were proven, and its exports at exits 2 and 4 of 6, reloaded in stock
transformers, give the exit's logits bit for bit. `python -m tests.any_model > docs/models.md` regenerates this page.

{len(passed)} encoders pass everything; {len(rows) - len(passed)} are refused or cannot be exported. {len(failed)} model
types could not be built or run as a tiny model, which says nothing about the real one.

## Passed

| model type | encoder | blocks | default exit | remarks |
|---|---|---|---|---|"""
    for row in passed:
        remarks = ["an exit is a slice (deepstack)"] * row.is_sliced + ["prompts of one length share a batch"] * (
            not row.can_pad
        )
        yield (
            f"| {row.model_type} | {row.modality} | `{row.blocks}` | {row.default_exit} of {row.num_layers} "
            f"| {'; '.join(remarks)} |"
        )
    yield "\n## Refused or not exported\n\n| model type | encoder | what exitsafe says |\n|---|---|---|"
    for row in rows:
        if not row.passes:
            said = row.refusal or row.export_problem or "the export does not reproduce the exit, and is refused"
            yield f"| {row.model_type} | {row.modality} | {said.removeprefix(row.model_type).strip()} |"
    yield "\n## Could not be built or run\n\n| model type | why |\n|---|---|"
    for name, reason in sorted(failed.items()):
        yield f"| {name} | {reason} |"
    yield _WHAT_IF_NOT


_WHAT_IF_NOT = """
## If your model is refused

The message names the check that failed.

- **No encoder**: no list of blocks runs in order, each on the output of the one before, so there
  is nothing to exit from.
- **Two encoders**, **one encoder**: there are two towers, or several stages; an exit would shorten only one
  of them.
- **Default exit**, **distinct exits**, **skipped blocks**, **replay**, **restoring**: the model's code does more
  with its blocks than run them once, in order.
- **Generation**, **mixed batches**, **training**: the logits of our loop differ from those of `generate`: the model
  handles positions, masks or its cache in a way that exitsafe does not support.
- **Export**: no edit of the config gives a stock model that ends at the exit. Audit and align still work.

If it is a published model, please open an issue with its name and the message.

A model whose code is on the Hub (`--trust-remote-code`) goes through the same checks. If its class has no
`get_image_features` that returns what its language model reads, it is refused as having no encoder.
"""


def main() -> None:
    """Print the page; progress goes to standard error."""
    found: list[Examined] = []
    failed: dict[str, str] = {}
    for model_type in model_types():
        for modality in ("image", "audio"):
            print(model_type, modality, file=sys.stderr)
            try:
                found.append(examine(model_type, modality))
            except LookupError:  # no feature path for it
                continue
            except Exception as error:  # noqa: BLE001 - of transformers, about the tiny model
                failed[model_type] = f"{type(error).__name__}: {first_line(error)}"[:120].replace("|", "/")
                break
    print(Counter(each.passes for each in found), file=sys.stderr)
    print("\n".join(_page(found, failed)))


if __name__ == "__main__":
    main()
