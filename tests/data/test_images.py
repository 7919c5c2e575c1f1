from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from exitsafe.data.images import check_image, open_image, path_inside
from exitsafe.errors import InputError
from tests.data.copies import png
from tests.tiny_models import noise_image


def _encoded(mode: str, format: str) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, format)
    return buffer.getvalue()


def _bomb() -> bytes:
    """A PNG of a few bytes whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
    ],
)
def test_every_mode_of_8_bits_or_fewer_works_down_to_the_model(mode: str, format: str) -> None:  # noqa: A002
    content = _encoded(mode, format)
    check_image(content, where="here")
    assert open_image(content, "s").mode == "RGB"


def test_bombs_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="has implausibly many pixels; scale it down"):
        check_image(_bomb(), where="here")
    wide = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(wide, "PNG")  # Pillow only warns
    with pytest.raises(InputError, match="has implausibly many pixels; scale it down"):
        check_image(wide.getvalue(), where="here")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(format: str) -> None:  # noqa: A002
    with pytest.raises(InputError, match="cannot be read as PNG, JPEG or WebP; convert it"):
        check_image(_encoded("L", format), where="here")


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match=r"image .*a\.png does not exist"):
        check_image(path, where="here")
    path.mkdir()
    with pytest.raises(InputError, match=r"image .*a\.png cannot be read \(.*directory"):
        check_image(path, where="here")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(.*Permission denied\); replace it or remove the row"):
        check_image(path, where="here")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.com/a.png", "is given by https: URL; download it first and give its path"),
        ("data:image/png;base64,AAAA", "is given by data: URL"),
        ("/etc/a.png", "leaves the suite's folder"),
        ("C:\\a.png", "leaves the suite's folder"),
        ("\\\\host\\share\\a.png", "leaves the suite's folder"),
        ("a/../../b.png", "leaves the suite's folder"),
        ("out.png", "links to a file outside the suite's folder; put a copy there"),
        ("folder-out/a.png", "links to a file outside the suite's folder"),
        ("ring.png", "is not a valid path|is a link"),
        ("a\0.png", "is not a valid path"),
    ],
)
def test_paths_that_leave_the_folder(tmp_path: Path, name: str, message: str) -> None:
    folder, outside = tmp_path / "suite", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(png())
    (folder / "out.png").symlink_to(outside / "a.png")
    (folder / "folder-out").symlink_to(outside)
    (folder / "ring.png").symlink_to(folder / "ring.png")
    with pytest.raises(InputError, match=message) as caught:
        check_image(path_inside(folder, name, where="here"), where="here")
    assert "\n" not in str(caught.value)


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert path_inside(tmp_path, "b.png", where="here") == tmp_path / "b.png"
    (tmp_path.parent / "link").unlink(missing_ok=True)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    assert path_inside(tmp_path.parent / "link", "b.png", where="here").is_file()


def _saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_upright(orientation: int, format: str) -> None:  # noqa: A002
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[:16, :24] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = _saved(Image.fromarray(pixels), format, exif=exif.tobytes())
    with Image.open(io.BytesIO(content)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    for source in (content, Image.open(io.BytesIO(content))):
        seen = open_image(source, "s")
        assert seen.size == expected.size == ((32, 48) if orientation > 4 else (48, 32))
        assert seen.tobytes() == expected.tobytes()


def test_exif_that_cannot_be_read_is_ignored() -> None:
    content = _saved(Image.new("RGB", (2, 2), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff torn")
    assert open_image(content, "s").size == (2, 2)


def test_transparent_pixels_are_on_a_white_page() -> None:
    white, green = (255, 255, 255), (0, 255, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    key = Image.new("RGB", (2, 1), (1, 2, 3))
    key.putpixel((1, 0), green)
    through = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    through.putpixel((1, 0), (*green, 255))
    for content in (
        _saved(palette, transparency=0),
        _saved(palette, "GIF", transparency=0),
        _saved(key, transparency=(1, 2, 3)),
        _saved(through),
        _saved(through, "WEBP", lossless=True),
    ):
        seen = open_image(content, "s")
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [white, green]
    assert open_image(Image.new("LA", (1, 1), (0, 128)), "s").getpixel((0, 0)) == (127, 127, 127)


def test_16_bits_are_scaled_and_not_clipped() -> None:
    deep = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    for source in (_saved(Image.fromarray(deep)), Image.fromarray(deep), Image.fromarray(deep.astype(">u2"))):
        assert np.asarray(open_image(source, "s"))[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    check_image(_saved(Image.fromarray(deep)), where="here")
    clear = open_image(_saved(Image.fromarray(deep), transparency=32768), "s")
    assert np.asarray(clear)[0, :, 0].tolist() == [0, 1, 1, 255, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused_for_their_brightness_is_unknown(mode: str) -> None:
    with pytest.raises(InputError, match=r"sample s: image .*32 bits per pixel .*; save it with 8 or 16"):
        open_image(Image.new(mode, (2, 2)), "s")


def _profile(*, swapped: bool) -> bytes:
    """sRGB's, or that of a screen whose red is sRGB's green and the other way round."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", content[128:132])[0]
    tags = {bytes(content[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    if swapped:
        red, green = tags[b"rXYZ"], tags[b"gXYZ"]
        content[red + 4 : red + 12], content[green + 4 : green + 12] = (
            content[green + 4 : green + 12],
            content[red + 4 : red + 12],
        )
    return bytes(content)


def test_a_profile_is_converted_to_srgb() -> None:
    swapped = _profile(swapped=True)
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    for content in (_saved(red, icc_profile=swapped), _saved(red, "WEBP", lossless=True, icc_profile=swapped)):
        assert open_image(content, "s").getpixel((0, 0)) == (0, 255, 0)
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half.info["icc_profile"] = swapped
    assert open_image(half, "s").getpixel((0, 0)) == (255, 255, 255)


def test_a_profile_that_does_not_fit_is_ignored() -> None:
    srgb = _profile(swapped=False)
    for image, profile in ((Image.new("L", (1, 1), 90), srgb), (Image.new("RGB", (1, 1), (90,) * 3), b"junk" * 40)):
        assert open_image(_saved(image, icc_profile=profile), "s").getpixel((0, 0)) == (90, 90, 90)


def test_a_plain_picture_is_as_it_is() -> None:
    noise = noise_image(3, (9, 7))
    assert open_image(_saved(noise), "s").tobytes() == open_image(noise, "s").tobytes() == noise.tobytes()


def test_of_an_animation_the_first_frame_is_seen() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    content = _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(content, "s").getpixel((0, 0)) == (255, 0, 0)
