"""What a server may be running: every exit of the reference, right or with a fault that runtimes are known to have.

The reference computes what each candidate would answer. Candidates differ in the features of a picture only; how
pictures are prepared (`preparations_of`) is a separate question, asked once the exit is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import PILImageResampling

from exitsafe.engine.prompts import Prompt, Row
from exitsafe.exits.checks import fixed_size
from exitsafe.exits.encoder import embeddings_in, first_tensor
from exitsafe.machine.memory import BatchSize
from exitsafe.records import Sample

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.features import Features

CLASS_TOKEN = "the class token left in"
POST_NORM = "the post-norm applied"
BILINEAR, BICUBIC = "resized with a bilinear filter", "resized with a bicubic filter"
PADDED = "padded to a square with the mean colour"
PADDED_AS_CLIP, PADDED_BLACK = "padded to a square with CLIP's mean colour", "padded to a square with black"
_COLOURS = {PADDED_AS_CLIP: (122, 116, 104), PADDED_BLACK: (0, 0, 0)}
_FILTERS = {BILINEAR: PILImageResampling.BILINEAR, BICUBIC: PILImageResampling.BICUBIC}
_NO_MEMORY = (
    "out of memory while the reference reads a single prompt: load it with a smaller dtype, or on another device"
)


@dataclass(frozen=True, order=True)
class Candidate:
    """An exit (0 if no encoder block runs), what is wrong with its features, and how else pictures are prepared."""

    exit_layer: int
    fault: str = ""
    preparation: str = ""

    def __str__(self) -> str:
        return f"exit {self.exit_layer}" + (f" with {self.fault}" if self.fault else "")


def candidates_of(vlm: VLM) -> list[Candidate]:
    """Every exit whose features differ, and each with every fault that this model can have."""
    exits = [each for each in vlm.exit_layers if each == vlm.default_exit or not vlm.reads_default(each)]
    if not vlm.encoder.is_sliced and vlm.translators is None:
        exits = [0, *exits]
    faults = ["", *([CLASS_TOKEN] if _class_embedding(vlm) else []), *([POST_NORM] if _unused_post_norm(vlm) else [])]
    return [Candidate(exit_layer, fault) for fault in faults for exit_layer in exits]


def preparations_of(vlm: VLM, candidate: Candidate) -> list[Candidate]:
    """The candidate with pictures prepared as by the reference's own processor, and in every other way."""
    images: Any = getattr(vlm.processor, "image_processor", None)
    own = getattr(images, "resample", None)
    others = [name for name, its_filter in _FILTERS.items() if own is not None and int(own) != int(its_filter)]
    if fixed_size(vlm.base_model) is not None and getattr(images, "image_mean", None) is not None:
        others += [PADDED, *(name for name, colour in _COLOURS.items() if colour != _mean_colour(images))]
    return [Candidate(candidate.exit_layer, candidate.fault, each) for each in ("", *others)]


class Reference:
    """The audited model, at any candidate.

    Args:
        vlm: The model.
        max_new_tokens: Longest answer.
    """

    def __init__(self, vlm: VLM, *, max_new_tokens: int) -> None:
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self._batch_size = BatchSize(32, problem=_NO_MEMORY)

    def prompt(self, sample: Sample, preparation: str = "") -> Prompt:
        """The sample as the model reads it, its pictures prepared in one of the ways of `preparations_of`."""
        images: Any = getattr(self.vlm.processor, "image_processor", None)
        if preparation in (PADDED, *_COLOURS):
            colour = _COLOURS.get(preparation) or _mean_colour(images)
            padded = (_padded(image, colour) for image in sample.images if isinstance(image, Image.Image))
            sample = replace(sample, images=tuple(padded))
        if preparation not in _FILTERS:
            return self.vlm.encode_prompt(sample)
        own, images.resample = images.resample, _FILTERS[preparation]
        try:
            return self.vlm.encode_prompt(sample)
        finally:
            images.resample = own

    def rows(self, sample: Sample, candidates: Sequence[Candidate]) -> list[Row]:
        """The sample's prompt with the features of every candidate, in order."""
        found: dict[Candidate, Row] = {}
        for preparation in dict.fromkeys(each.preparation for each in candidates):
            prompt = self.prompt(sample, preparation)
            same = [each for each in candidates if each.preparation == preparation]
            for candidate, features in _features(self.vlm, prompt, same).items():
                found[candidate] = Row(prompt=prompt, exit_layer=candidate.exit_layer, features=features)
        return [found[each] for each in candidates]

    def logprobs(self, rows: Sequence[Row], responses: Sequence[Tensor]) -> Iterator[Tensor]:
        """For every row the log-probabilities of all tokens at each token of its response: (T, V), float32."""
        waiting = list(range(len(rows)))

        def work(size: int) -> Iterator[Tensor]:
            while waiting:
                chunk = waiting[:size]
                with torch.no_grad():
                    hidden, _, _ = self.vlm.response_states(
                        [rows[index] for index in chunk], [responses[index] for index in chunk]
                    )
                    for index, states in zip(chunk, hidden, strict=True):
                        found = torch.log_softmax(self.vlm.logits(states[: len(responses[index])]), dim=-1)
                        waiting.remove(index)
                        yield found.cpu()

        return self._batch_size.halving(work)

    def readable(self, token_ids: Sequence[int]) -> Tensor:
        """An answer as `logprobs` takes it: up to its first special token, which may stand for a picture.

        The last token is not read, so it may be any.
        """
        special = set(self.vlm.special_token_ids)
        end = next((place for place, token in enumerate(token_ids) if token in special), len(token_ids) - 1)
        return torch.tensor([*token_ids[:end], self.vlm.pad_token_id])

    def answers(self, rows: Sequence[Row]) -> list[tuple[str, float]]:
        """The greedy answer of every row, and its margin: the smallest difference, along the answer, between the
        log-probabilities of the best and the second best token."""
        done = self.vlm.complete(
            rows, max_new_tokens=self.max_new_tokens, temperature=0.0, seed=0, batch_size=self._batch_size
        )
        tokens = {index: torch.tensor(completion.token_ids) for index, completion in done}
        answers = [tokens[index] for index in range(len(rows))]
        readable = [self.readable(answer.tolist()) for answer in answers]
        best = (logprobs.topk(2, dim=-1).values for logprobs in self.logprobs(rows, readable))
        margins = [float((two[:, 0] - two[:, 1]).min()) for two in best]
        return [(self.vlm.decode(answer.tolist()), margin) for answer, margin in zip(answers, margins, strict=True)]


def _features(vlm: VLM, prompt: Prompt, candidates: Sequence[Candidate]) -> Mapping[Candidate, Features | None]:
    if not prompt.media:
        return dict.fromkeys(candidates)
    found: dict[Candidate, Features | None] = {}
    for fault in {each.fault for each in candidates} - {POST_NORM}:
        with _class_token_last(vlm, applies=fault == CLASS_TOKEN):
            plain = [each for each in candidates if each.fault == fault and each.exit_layer > 0]
            (by_exit,) = vlm.prompt_features([prompt], [each.exit_layer for each in plain])
            found |= {each: by_exit[each.exit_layer] for each in plain}
            for each in candidates:
                if each.fault == fault and each.exit_layer == 0:
                    found[each] = _changed(vlm, prompt, 0, lambda hidden: hidden)
    for each in candidates:
        if each.fault == POST_NORM:
            found[each] = _changed(vlm, prompt, each.exit_layer, _post_norm(vlm))
    return found


def _changed(vlm: VLM, prompt: Prompt, exit_layer: int, change: Callable[[Tensor], Tensor]) -> Features | None:
    """The features of an exit, 0 included, whose hidden state is changed before the model reads it."""
    deepest = max(exit_layer, 1)

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        hidden = first_tensor((args, kwargs) if exit_layer == 0 else output)
        assert hidden is not None
        return (change(hidden), *output[1:]) if isinstance(output, tuple) else change(hidden)

    # first, so that transformers' own hook, which collects hidden states, sees the change
    handle = vlm.encoder_blocks[deepest - 1].register_forward_hook(hook, with_kwargs=True, prepend=True)
    try:
        return vlm.prompt_features([prompt], [deepest])[0][deepest]
    finally:
        handle.remove()


def _class_embedding(vlm: VLM) -> Any:
    """The module that puts a class token before a picture's patches and adds positions; None if there is none."""
    parts = (
        each for each in vlm.tower.modules() if isinstance(getattr(each, "position_embedding", None), nn.Embedding)
    )
    return next((each for each in parts if getattr(each, "class_embedding", None) is not None), None)


@contextmanager
def _class_token_last(vlm: VLM, *, applies: bool) -> Iterator[None]:
    """llama.cpp's fault (its issue 25814): the class token follows the patches, which get the positions of their left
    neighbours, and its features are read in place of the first patch's."""
    if not applies:
        yield
        return
    module = _class_embedding(vlm)

    def hook(_: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        positions: Tensor = module.position_embedding.weight
        return (output - positions).roll(-1, dims=1) + positions

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _post_norm(vlm: VLM) -> Any:
    return next((each for name, each in vlm.tower.named_modules() if name.endswith("post_layernorm")), None)


def _unused_post_norm(vlm: VLM) -> bool:
    """Whether the encoder has a norm after its last block that the model's features do not pass through."""
    norm = _post_norm(vlm)
    if norm is None or vlm.encoder.is_sliced:
        return False
    prompt, default = vlm.probe(), vlm.default_exit
    read = partial(vlm.prompt_features, [prompt], [default])
    before = read()[0][default]
    handle = norm.register_forward_hook(lambda module, args, output: output + 1)
    try:
        after = read()[0][default]
    finally:
        handle.remove()
    assert before is not None and after is not None
    pairs = (tuple(first_tensor(embeddings_in(each["image"])) for each in (before, after)),)
    return all(one is not None and two is not None and torch.equal(one, two) for one, two in pairs)


def _mean_colour(images: Any) -> tuple[int, ...]:
    return tuple(int(255 * each) for each in images.image_mean)


def _padded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
