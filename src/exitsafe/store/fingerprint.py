"""What identifies a run: settings and samples in, canonical JSON, hashes and differences out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from exitsafe.data.images import open_image
from exitsafe.errors import InputError
from exitsafe.records import AudioSource, ImageSource, Sample, VideoSource
from exitsafe.store.tables import SampleInfo
from exitsafe.untrusted import JsonObject, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.huggingface import MultimodalProcessor

Settings = Mapping[str, Any]
"""A JSON object that is only read."""


def canonical_json(value: object) -> str:
    """The canonical form of a JSON value: sorted keys, no spaces, ASCII.

    >>> canonical_json({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def data_fingerprint(samples: Sequence[SampleInfo]) -> JsonObject:
    """The hash of the samples, in order, with readable counts."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(canonical_json(asdict(sample)).encode() + b"\n")
    return {
        "samples": len(samples),
        "sources": dict(sorted(Counter(sample.source for sample in samples).items())),
        "hash": digest.hexdigest(),
    }


def decoder_versions(samples: Sequence[Sample]) -> dict[str, str]:
    """Versions of the packages that decode the samples' video and audio files and resample their audio."""
    has_video_file = any(not isinstance(video, tuple) for sample in samples for video in sample.videos)
    has_audio_file = any(not isinstance(audio, tuple) for sample in samples for audio in sample.audios)
    needed = {"av": has_video_file, "soundfile": has_audio_file, "scipy": any(sample.audios for sample in samples)}
    return {name: version(name) for name, is_needed in needed.items() if is_needed}


def processor_versions(vlm: VLM) -> dict[str, str]:
    """The version of torchvision where it prepares the model's pictures: its pixels differ from PIL's by rounding."""
    preparing = (getattr(vlm.processor, name, None) for name in ("image_processor", "video_processor"))
    uses_it = any(part is not None and not type(part).__name__.endswith("Pil") for part in preparing)
    return {"torchvision": version("torchvision")} if uses_it else {}


def model_fingerprint(vlm: VLM) -> JsonObject:
    """The model as loaded: everything about it that may change an answer."""
    # no entry without translators, so that runs made before translators existed can be resumed
    translators = {} if vlm.translators is None else {"translators": vlm.translators.hash}
    return translators | {
        "name": vlm.name,
        "family": vlm.family,
        "encoder": vlm.encoder.modality,
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
        vlm: The model whose `today` is set, if the folder contains a run with a date.
        folder: The folder of an audit or a training run.
    """
    # an unusable folder is refused when it is opened
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        vlm.today = today_of(read_json(Path(folder) / "run.json")["settings"]) or vlm.today


def today_of(settings: Settings) -> str | None:
    """The date in a run's prompts; None if the chat template writes none."""
    today = (settings.get("prompts") or {}).get("today")
    return None if today is None else date.fromisoformat(today).isoformat()


def sample_info(sample: Sample) -> SampleInfo:
    """What a run records of a sample; the digest covers all that is asked and how it is judged, but no names.

    Raises:
        InputError: If a file cannot be read.
    """
    asked = [sample.prompt, sample.kind, list(sample.answers), *_beside_prompt(sample, _media(sample))]
    return SampleInfo(
        id=sample.id,
        kind=sample.kind,
        category=sample.category,
        source=sample.source,
        digest=_digest(asked),
    )


def request_digest(sample: Sample) -> str:
    """Digest of what a model reads, regardless of the sample's id and scoring.

    Raises:
        InputError: If a file cannot be read.
    """
    return _request_digest(sample, _media(sample))


def media_digests(sample: Sample) -> list[str]:
    """Digest of each picture, video and audio.

    Raises:
        InputError: If a file cannot be read.
    """
    return _flat(_media(sample))


def trained_on_among(samples: Sequence[Sample], digests: Collection[str]) -> dict[str, int] | None:
    """The number of samples on which, or on whose pictures, videos or audio, a repair was trained; None if that is
    unknown."""
    if not digests:
        return None
    found = 0
    for sample in samples:
        media = _media(sample)
        found += any(digest in digests for digest in (_request_digest(sample, media), *_flat(media)))
    return {"samples": found, "of": len(samples)}


def _media(sample: Sample) -> dict[str, list[str]]:
    """The digests of what a sample has for encoders to read."""
    return {
        "images": [_image_digest(image, sample.id) for image in sample.images],
        "videos": [_video_digest(video, sample.id) for video in sample.videos],
        "audios": [_audio_digest(audio, sample.id) for audio in sample.audios],
    }


def _flat(media: Mapping[str, list[str]]) -> list[str]:
    return [digest for digests in media.values() for digest in digests]


def _beside_prompt(sample: Sample, media: Mapping[str, list[str]]) -> list[object]:
    """The pictures' digests, and a record of what else a model reads where there is more: digests of samples with
    pictures alone are older than the other fields, and must remain valid."""
    more = {"videos": media["videos"], "audios": media["audios"], "system": sample.system}
    given = {name: value for name, value in more.items() if value}
    return [media["images"], *([given] if given else [])]


def _request_digest(sample: Sample, media: Mapping[str, list[str]]) -> str:
    return _digest([sample.prompt, *_beside_prompt(sample, media)])


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(old: Settings, new: Settings) -> list[str]:
    """The differences between two settings, one readable line per value.

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


def _quantization(config: PretrainedConfig) -> JsonObject | None:
    """The quantization settings, if any: a JSON object from a checkpoint, or an instance of transformers' class."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def _attention(config: PretrainedConfig) -> dict[str, str]:
    """The attention implementations of the model and its parts."""
    parts = {"model": config} | {name: getattr(config, name) for name in config.sub_configs}
    return {name: str(part._attn_implementation) for name, part in parts.items() if part is not None}


def _processor(processor: MultimodalProcessor | None) -> JsonObject | None:
    """Classes, since backends resize differently, and hashes of settings, vocabulary and chat template."""
    if processor is None:
        return None
    content = {
        "settings": str(processor.to_json_string()),
        "vocabulary": canonical_json(processor.tokenizer.get_vocab()),
        "chat_template": canonical_json(processor.chat_template),
    }
    images = getattr(processor, "image_processor", None)  # none, if it reads only audio
    return {
        "class": type(processor).__name__,
        "image_processor": None if images is None else type(images).__name__,
        **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in content.items()},
    }


def _image_digest(image: ImageSource, sample_id: str) -> str:
    """Digest of the encoded bytes if available, else of the pixels as a model sees them."""
    if isinstance(image, Image.Image):
        seen = open_image(image, sample_id)  # an opened file is decoded here
        return hashlib.sha256(f"{seen.mode} {seen.size}".encode() + seen.tobytes()).hexdigest()
    return _file_digest(image, f"sample {sample_id}: image")


def _video_digest(video: VideoSource, sample_id: str) -> str:
    if isinstance(video, tuple):
        return _digest([_image_digest(frame, sample_id) for frame in video])
    return _file_digest(video, f"sample {sample_id}: video")


def _audio_digest(audio: AudioSource, sample_id: str) -> str:
    if isinstance(audio, tuple):
        values, rate = audio
        return hashlib.sha256(f"{values.dtype} {rate} ".encode() + values.tobytes()).hexdigest()
    return _file_digest(audio, f"sample {sample_id}: audio")


def _file_digest(file: Path | bytes, what: str) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    try:
        with Path(file).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{what} {file!s} cannot be read ({error.strerror or error}); check the path") from error
