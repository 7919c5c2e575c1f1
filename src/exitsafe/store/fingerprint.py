"""What makes two runs the same run: settings and samples in, canonical JSON, hashes and differences out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from exitsafe.data.images import open_image
from exitsafe.errors import InputError
from exitsafe.records import Sample
from exitsafe.store.tables import SampleInfo
from exitsafe.untrusted import read_json

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

Settings = Mapping[str, Any]
"""A JSON object, nested as it likes."""


def canonical_json(value: object) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII.

    >>> canonical_json({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def data_fingerprint(samples: Sequence[SampleInfo]) -> dict[str, Any]:
    """The samples' hash, in order, with readable counts beside it."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(canonical_json(asdict(sample)).encode() + b"\n")
    return {
        "samples": len(samples),
        "sources": dict(sorted(Counter(sample.source for sample in samples).items())),
        "hash": whole.hexdigest(),
    }


def model_fingerprint(vlm: VLM) -> dict[str, Any]:
    """The model as loaded: everything about it that may change an answer."""
    # only where there are any: runs made before there were translators go on
    translators = {} if vlm.translators is None else {"translators": vlm.translators.hash}
    return translators | {
        "name": vlm.name,
        "family": vlm.family,
        "num_layers": vlm.num_layers,
        "default_exit": vlm.default_exit,
        "checkpoint": vlm.checkpoint_hash,
        "adapter": vlm.adapter_hash,
        "dtype": str(vlm.base_model.dtype).removeprefix("torch."),
        "quantization": _quantization(vlm.base_model.config),
        "attention": _attention(vlm.base_model.config),
        "device": vlm.device.type,
        "processor": _processor(vlm.processor),
    }


def pin_today(vlm: VLM, folder: str | Path) -> None:
    """Give a resumed run's chat template the date on which the run began, so that its prompts stay the same.

    Args:
        vlm: Whose date is set, if the folder holds a run that has one.
        folder: Of an audit or a training.
    """
    # a folder that cannot be used is refused when it is opened
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        vlm.today = today_of(read_json(Path(folder) / "run.json")["settings"]) or vlm.today


def today_of(settings: Settings) -> str | None:
    """The date in a run's prompts; None where their chat template writes none."""
    today = (settings.get("prompts") or {}).get("today")
    return None if today is None else date.fromisoformat(today).isoformat()


def sample_info(sample: Sample) -> SampleInfo:
    """What a run keeps of a sample; its digest covers prompt, images, kind and answers, but no names.

    Raises:
        InputError: If an image file cannot be read.
    """
    images = [_image_digest(image, sample.id) for image in sample.images]
    asked = [sample.prompt, sample.kind, list(sample.answers), images]
    return SampleInfo(
        id=sample.id,
        kind=sample.kind,
        category=sample.category,
        source=sample.source,
        digest=hashlib.sha256(canonical_json(asked).encode()).hexdigest(),
    )


def request_digest(sample: Sample) -> str:
    """Digest of what a model reads, prompt and pictures, whatever the sample is called and however it is scored.

    Raises:
        InputError: If an image file cannot be read.
    """
    return _request_digest(sample.prompt, picture_digests(sample))


def picture_digests(sample: Sample) -> list[str]:
    """Digest of each picture.

    Raises:
        InputError: If an image file cannot be read.
    """
    return [_image_digest(image, sample.id) for image in sample.images]


def trained_on_among(samples: Sequence[Sample], digests: Collection[str]) -> dict[str, int] | None:
    """How many samples, or their pictures, a repair was trained on; None if its training data is unknown."""
    if not digests:
        return None
    found = 0
    for sample in samples:
        pictures = picture_digests(sample)
        found += any(digest in digests for digest in (_request_digest(sample.prompt, pictures), *pictures))
    return {"samples": found, "of": len(samples)}


def _request_digest(prompt: str, pictures: list[str]) -> str:
    return hashlib.sha256(canonical_json([prompt, pictures]).encode()).hexdigest()


def differences(old: Settings, new: Settings) -> list[str]:
    """What differs between two settings, one readable line per value.

    >>> differences({"decoding": {"seed": 0, "n": 8}}, {"decoding": {"seed": 1, "n": 8}})
    ['decoding.seed was 0, is now 1']
    """
    was, now = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name} was {was.get(name, 'absent')}, is now {now.get(name, 'absent')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def _leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, canonical_json(value)


def _quantization(config: Any) -> dict[str, Any] | None:
    """Only quantised models have the entry: a JSON object from a checkpoint, or transformers' own class."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def _attention(config: Any) -> dict[str, str]:
    """Which attention kernels the model and its parts run."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    return {name: str(part._attn_implementation) for name, part in {"model": config, **parts}.items()}


def _processor(processor: Any) -> dict[str, Any] | None:
    """Classes, since backends resize differently; settings, vocabulary and chat template as hashes."""
    if processor is None:
        return None
    content = {
        "settings": processor.to_json_string(),
        "vocabulary": canonical_json(processor.tokenizer.get_vocab()),
        "chat_template": canonical_json(processor.chat_template),
    }
    return {
        "class": type(processor).__name__,
        "image_processor": type(processor.image_processor).__name__,
        **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in content.items()},
    }


def _image_digest(image: Image.Image | Path | bytes, sample_id: str) -> str:
    """Digest of the encoded bytes if there are any, else of the pixels as a model sees them."""
    if isinstance(image, Image.Image):
        seen = open_image(image, sample_id)  # an opened file is decoded here
        return hashlib.sha256(f"{seen.mode} {seen.size}".encode() + seen.tobytes()).hexdigest()
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise InputError(f"sample {sample_id}: image {image!s} cannot be read ({error.strerror or error})") from error
    return hashlib.sha256(content).hexdigest()
