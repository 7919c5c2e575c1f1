"""What a model will read for all samples of a run, computed before it answers the first."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exitsafe.data.images import num_pixels
from exitsafe.engine.prompts import opens_itself, too_long, written
from exitsafe.engine.reader import Reader
from exitsafe.errors import InputError
from exitsafe.records import Sample

DEFAULT_NEW_TOKENS = 256
_FEWEST_TOKENS = 16  # of an answer without a requested limit: a refusal needs about as many
_MEASURED, _MOST_ENCODED = 4, 64  # samples


@dataclass(frozen=True, kw_only=True)
class ReadAhead:
    """What a model will read for all samples of a run.

    `hash` covers the rendered texts and their token ids; `today` is the date in them, if they depend on it;
    `max_new_tokens` fits after the longest prompt, which has `num_tokens` tokens at most.
    """

    hash: str
    today: str | None
    max_new_tokens: int
    num_tokens: int

    @property
    def settings(self) -> dict[str, str]:
        """What must be equal in two runs that read the same, as a JSON object."""
        return {"hash": self.hash} | ({} if self.today is None else {"today": self.today})


def read_ahead(vlm: Reader, samples: Sequence[Sample], *, max_new_tokens: int | None) -> ReadAhead:
    """Render and tokenise all texts, and check that they leave room for an answer.

    Image tokens are estimated from the images with the most pixels, those of videos and audio from the first few;
    only samples that may be too long by that estimate are fully encoded. Others that turn out to be too long are found
    when they are answered.

    Args:
        vlm: The model.
        samples: All samples of a run.
        max_new_tokens: Longest answer; None uses `DEFAULT_NEW_TOKENS`, or less if the context leaves less.

    Raises:
        InputError: If a prompt contains the image placeholder or leaves no room for the answer.
        ModelError: If there is no processor, or its chat template leaves something out.
    """
    wanted = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if max_new_tokens is not None and wanted >= vlm.context_length:
        raise InputError(
            f"max_new_tokens={wanted}, but this model has room for {vlm.context_length} tokens, prompt and answer "
            "together: choose fewer"
        )
    digest, lengths = hashlib.sha256(), []
    for sample in samples:
        text = written(sample, vlm.processor, vlm.placeholders, today=vlm.today)
        tokenizer = vlm.processor.tokenizer
        ids = tokenizer(text, add_special_tokens=not opens_itself(text, tokenizer), verbose=False).input_ids
        digest.update(json.dumps([text, ids]).encode() + b"\n")
        lengths.append(len(ids))
    room = vlm.context_length - wanted
    longest, num_tokens = _longest(vlm, samples, lengths, room=room)
    if num_tokens > room:
        left = vlm.context_length - num_tokens
        if max_new_tokens is not None or left < _FEWEST_TOKENS:
            raise too_long(samples[longest].id, num_tokens, wanted, context_length=vlm.context_length)
        warnings.warn(
            f"answers are limited to {left} tokens instead of {wanted}: the prompt of sample {samples[longest].id} "
            f"takes {num_tokens} of this model's {vlm.context_length}",
            stacklevel=3,
        )
        wanted = left
    today = vlm.today if vlm.is_dated else None
    return ReadAhead(hash=digest.hexdigest(), today=today, max_new_tokens=wanted, num_tokens=num_tokens)


def _longest(vlm: Reader, samples: Sequence[Sample], lengths: Sequence[int], *, room: int) -> tuple[int, int]:
    """The index and length of the longest prompt; the length is exact if it may not fit, else an upper bound."""
    likely = list(lengths)
    for media in (lambda sample: sample.images, lambda sample: sample.videos, lambda sample: sample.audios):
        each = _tokens_per_medium(vlm, samples, lengths, media)
        likely = [length + each * len(media(sample)) for length, sample in zip(likely, samples, strict=True)]
    found = (0, 0)
    for place in sorted(range(len(samples)), key=lambda place: -likely[place])[:_MOST_ENCODED]:
        if likely[place] <= found[1]:
            break
        is_exact = likely[place] <= room or likely[place] == lengths[place]
        num_tokens = likely[place] if is_exact else len(vlm.encode_prompt(samples[place]).input_ids)
        found = max(found, (place, num_tokens), key=lambda pair: pair[1])
    return found


def _tokens_per_medium(
    vlm: Reader, samples: Sequence[Sample], lengths: Sequence[int], media: Callable[[Sample], Sequence[object]]
) -> int:
    """The most tokens that one of these media adds to its placeholder: measured on the samples with the largest images,
    and on the first few with videos or audio."""
    sizes = {
        place: max((num_pixels(image, sample.id) for image in sample.images), default=0)
        for place, sample in enumerate(samples)
        if media(sample)
    }
    added = [
        -(-(len(vlm.encode_prompt(samples[place]).input_ids) - lengths[place]) // len(media(samples[place])))
        for place in sorted(sizes, key=lambda place: -sizes[place])[:_MEASURED]
    ]
    return max(added, default=0)
