"""Pictures: located inside a suite's folder, checked, and opened as RGB, so that a model sees what a viewer shows."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from exitsafe.errors import InputError
from exitsafe.records import Sample

FORMATS = ("PNG", "JPEG", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPAQUE = {"RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB", "P": "RGB", "PA": "RGB", "1": "L", "LA": "L"}
MAX_ASPECT_RATIO = 200  # processors scale the short side to some hundred pixels, and the long one with it


def path_inside(folder: Path, name: str, *, where: str, medium: str = "image") -> Path:
    """The path of an image, video or audio that a row names.

    Raises:
        InputError: If it is a URL or absolute, or leaves the folder by `..` or a link: a suite from elsewhere must not
            read other files.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", name):
        scheme = name.split(":", 1)[0]
        raise InputError(f"{where}: the {medium} is given by {scheme}: URL; download it first and give its path")
    is_absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if is_absolute or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise InputError(f"{where}: {medium} {name!r} leaves the suite's folder; give a path inside it")
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # circular links, a null character
        raise InputError(
            f"{where}: {medium} {name!r} is not a valid path; give one inside the suite's folder"
        ) from error
    if not is_inside:
        raise InputError(f"{where}: {medium} {name!r} links to a file outside the suite's folder; put a copy there")
    return path


def check_image(image: Path | bytes, *, where: str) -> None:
    """Decode an image once and discard it, so that a broken file is found before the model is loaded.

    Raises:
        InputError: If it is missing, not a file, not PNG, JPEG or WebP, implausibly large or elongated, or cannot be
            decoded.
    """
    name = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    if isinstance(image, Path) and is_pipe(image):  # opening it would wait for a writer
        raise InputError(f"{where}: image {name} is not a regular file; give the path of one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = io.BytesIO(image) if isinstance(image, bytes) else image
            with Image.open(source, formats=FORMATS) as opened:
                short, long = min(opened.size), max(opened.size)
                # JPEG can decode at an eighth of the size: eight times faster, and a truncated file still fails
                opened.draft("RGB", (32, 32))
                opened.load()
    except FileNotFoundError as error:
        raise InputError(f"{where}: image {name} does not exist; add it or remove the row") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{where}: image {name} cannot be read as PNG, JPEG or WebP; convert it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where}: image {name} has implausibly many pixels; scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{where}: image {name} cannot be read ({error}); replace it or remove the row") from error
    if long > MAX_ASPECT_RATIO * short:
        raise InputError(f"{where}: image {name} is {long // short} times as long as wide; crop it")


def open_image(source: Image.Image | Path | str | bytes, sample_id: str) -> Image.Image:
    """Open a picture `as_seen`; for an animation, its first frame.

    Raises:
        InputError: If it cannot be opened or decoded.
    """
    with _opened(source, sample_id) as image:
        return as_seen(image)


def open_images(sample: Sample) -> list[Image.Image]:
    """The pictures of a sample, in order, each as `open_image` returns it.

    Raises:
        InputError: If one cannot be opened or decoded.
    """
    return [open_image(image, sample.id) for image in sample.images]


def num_pixels(source: Image.Image | Path | str | bytes, sample_id: str) -> int:
    """Width times height, from the file's header.

    Raises:
        InputError: If it cannot be opened.
    """
    with _opened(source, sample_id) as image:
        return image.width * image.height


def as_seen(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: upright, in sRGB, and on white where it is transparent.

    EXIF's orientation is applied. An embedded ICC profile is converted to sRGB; one that does not fit the picture is
    ignored, as viewers do. 16 bits are scaled to 8. Without any of these, the result is `image.convert("RGB")`.

    Raises:
        ValueError: If pixels have 32 bits, which viewers show in different ways.
    """
    turn = _TURNS.get(_orientation(image) or 1)
    image = _with_8_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = _in_srgb(image)
    if alpha is not None:
        page = Image.new("RGB", image.size, "white")
        page.paste(colours, mask=alpha)
        colours = page
    return colours if turn is None else colours.transpose(turn)


@contextlib.contextmanager
def _opened(source: Image.Image | Path | str | bytes, sample_id: str) -> Iterator[Image.Image]:
    """The picture, not yet decoded; errors inside the context name its sample."""
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except FileNotFoundError as error:
        raise InputError(f"sample {sample_id}: image {name} does not exist; check the path") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"sample {sample_id}: image {name} cannot be read ({error}); replace it") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - Pillow's parser raises many kinds; viewers ignore EXIF that cannot be read
        return None


def _with_8_bits(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("32 bits per pixel have no agreed brightness scale; save it with 8 or 16")
    if image.mode == "I" or image.mode.startswith("I;16"):  # a 16-bit PNG is either, depending on Pillow's version
        deep = np.asarray(image).astype(np.int64)
        levels = Image.fromarray(((deep * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
        levels.info = {name: image.info[name] for name in image.info if name != "transparency"}
        clear = image.info.get("transparency")  # one level, in 16 bits
        if isinstance(clear, int):
            levels.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
        return levels
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours without transparency."""
    profile = image.info.get("icc_profile")
    if profile:
        opaque = image.convert(_OPAQUE.get(image.mode, image.mode))
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            found = ImageCms.profileToProfile(
                opaque, ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if found is not None:
                return found
    # RGBa cannot be converted to RGB directly
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")


def is_pipe(path: Path) -> bool:
    """Whether a path is a pipe, socket or device."""
    try:
        return path.exists() and not (path.is_file() or path.is_dir())
    except (OSError, ValueError):  # not a valid path: opening it says why
        return False
