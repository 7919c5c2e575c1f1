"""Pairs samples of text alone with benign pictures; a folder and a seed determine the pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exitsafe.data.images import ENDINGS, check_image
from exitsafe.errors import InputError
from exitsafe.records import Sample


def pair_with_images(samples: Sequence[Sample], folder: Path, *, seed: int) -> list[Sample]:
    """Give every sample without a picture, video or audio a picture from the folder.

    Which one depends only on the seed, the sample's id and the sorted names of the folder's pictures: adding, removing
    or reordering samples changes no pair.

    Raises:
        InputError: If the folder does not exist, lacks pictures that are needed, or one that is used cannot be read.
    """
    _check_folder(folder)
    names = list_images(folder) if any(sample.is_text_only for sample in samples) else []
    checked: set[str] = set()
    paired = []
    for sample in samples:
        if sample.is_text_only:
            name = names[_draw(seed, sample.id, len(names))]
            if name not in checked:
                check_image(folder / name, where=f"--images {folder}")
                checked.add(name)
            sample = replace(sample, images=(folder / name,))
        paired.append(sample)
    return paired


def list_images(folder: Path) -> list[str]:
    """The names of all pictures under a folder, relative to it, sorted.

    Raises:
        InputError: If it is not a folder or has none.
    """
    _check_folder(folder)
    try:
        paths = [path for path in folder.rglob("*") if _is_picture(path.relative_to(folder)) and path.is_file()]
    except OSError as error:
        raise InputError(f"--images {folder} cannot be listed ({error.strerror}); check its permissions") from error
    if not paths:
        raise InputError(f"--images {folder} contains no pictures; put {', '.join(ENDINGS)} files there")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"--images {folder} is not a folder; give one with benign pictures, e.g. COCO val2017")


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name; hidden files and macOS's archive metadata are not."""
    return path.suffix.lower() in ENDINGS and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _draw(seed: int, sample_id: str, count: int) -> int:
    key = f"{seed}\0{sample_id}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % count
