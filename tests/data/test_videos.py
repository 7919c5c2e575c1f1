from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exitsafe.data import videos
from exitsafe.data.videos import Video, check_video, open_videos
from exitsafe.errors import InputError
from exitsafe.records import Sample, VideoSource
from tests.data.copies import png
from tests.data.recordings import encoded, mp4, wav


def _open(video: Any, **options: int) -> Video:
    (found,) = open_videos(Sample(id="s", prompt="x", kind="benign", videos=(video,)), **options)
    return found


def _brightness(video: Video) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in video.frames]


def _gif(*colours: str) -> bytes:
    buffer = io.BytesIO()
    first, *more = [Image.new("RGB", (8, 8), colour) for colour in colours]
    first.save(buffer, "GIF", save_all=True, append_images=more, duration=250)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("mov", "mpeg4"),
        ("webm", "libvpx"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
    ],
)
def test_frames_are_evenly_spaced_and_know_their_times(container: str, codec: str) -> None:
    video = _open(mp4(50, fps=25, container=container, codec=codec), max_frames=5)
    assert [round(level / 50) for level in _brightness(video)] == [0, 1, 2, 3, 4]
    assert video.fps == 2.5
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (32, 16))}


def test_a_file_gives_at_most_32_frames_and_a_shorter_one_all(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(mp4(33))
    long, short = _open(tmp_path / "a.mp4"), _open(mp4(3))
    assert (len(long.frames), long.fps) == (32, 4 * 32 / 33)
    assert (len(short.frames), short.fps) == (3, 4.0)


def test_a_list_of_frames_is_two_per_second(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png("blue"))
    frames = [Image.new("RGBA", (8, 8), (255, 0, 0, 0)), tmp_path / "b.png", png("red"), png("lime")]
    video = _open(frames)
    assert [frame.getpixel((0, 0)) for frame in video.frames] == [(255,) * 3, (0, 0, 255), (255, 0, 0), (0, 255, 0)]
    assert video.fps == 2.0
    fewer = _open(frames, max_frames=2)
    assert [frame.getpixel((0, 0)) for frame in fewer.frames] == [(255,) * 3, (255, 0, 0)]
    assert fewer.fps == 1.0


def test_an_animation_is_a_video() -> None:
    video = _open(_gif("red", "blue", "lime"))
    assert [frame.getpixel((0, 0)) for frame in video.frames] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert video.fps == 4.0


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (15, 0)), ((-1, 0, 0, -1), (31, 15)), ((0, -1, 1, 0), (0, 31))],
)
def test_a_video_from_a_phone_held_sideways_is_upright(matrix: tuple[int, ...], corner: tuple[int, int]) -> None:
    """`corner` is where a player shows the upper left corner of the stored frame."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    content = bytearray(encoded([pixels]))
    a, b, c, d = (int(value * 65536).to_bytes(4, "big", signed=True) for value in matrix)
    zero, one = bytes(4), (1 << 30).to_bytes(4, "big")
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 36] = b"".join((a, b, zero, c, d, zero, zero, zero, one))
    (frame,) = _open(bytes(content)).frames
    assert frame.size == ((32, 16) if matrix[0] else (16, 32))
    levels = np.asarray(frame.convert("L"))
    at = levels[corner[1], corner[0]]
    assert at > 200
    assert levels[frame.height - 1 - corner[1], frame.width - 1 - corner[0]] < 50


def test_more_frames_in_the_header_than_in_the_file_are_not_asked_for() -> None:
    content = mp4(8, container="matroska")
    torn = content[: int(len(content) * 0.7)]
    assert 1 <= len(_open(torn).frames) < 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "video of 0 bytes cannot be read as MP4, M4V, MOV, WEBM, MKV, AVI, GIF; convert or replace it"),
        (b"rubbish" * 100, "cannot be read as MP4"),
        (png(), "cannot be read as MP4"),
        (mp4()[:600], "cannot be read as MP4"),
        (wav(), "cannot be read as MP4"),
        (mp4(1, size=(8, 4096)), "is implausibly elongated; crop it"),
        (mp4(1, size=(4096, 2400)), "is larger than 4K; scale it down"),
    ],
    ids=["empty", "rubbish", "png", "torn", "wav", "elongated", "large"],
)
def test_what_is_no_video_is_one_clear_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    for video in (content, tmp_path / "a.mp4"):
        with pytest.raises(InputError, match=r"^row 7: video ") as caught:
            check_video(video, where="row 7")
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=r"^sample s: video "):
            _open(video)
    with pytest.raises(InputError, match=message):
        check_video(content, where="row 7")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, message in (
        ("gone.mp4", r"row 1: video .*gone\.mp4 does not exist; add it or remove the row"),
        ("pipe.mp4", r"row 1: video .*pipe\.mp4 is not a regular file; give the path of one"),
        (".", r"row 1: video .* cannot be read \(.*directory"),
    ):
        with pytest.raises(InputError, match=message):
            check_video(tmp_path / name, where="row 1")


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.avi"])
def test_a_playlist_cannot_name_other_files(name: str, tmp_path: Path) -> None:
    """FFmpeg by itself follows it."""
    (tmp_path / "secret.mp4").write_bytes(mp4())
    (tmp_path / name).write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InputError, match="cannot be read as MP4"):
        check_video(tmp_path / name, where="row 1")


def test_a_playlist_that_ffmpeg_follows_shows_that_the_test_above_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "_OPTIONS", {})
    (tmp_path / "secret.mp4").write_bytes(mp4())
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    )
    check_video(tmp_path / "list.m3u8", where="row 1")


def test_long_videos_are_refused_without_being_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_MOST_FRAMES", 10)
    check_video(mp4(10), where="row 1")
    with pytest.raises(InputError, match=r"row 1: video of .* has more than 10 frames; cut it"):
        check_video(mp4(11), where="row 1")


def test_frames_of_different_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="sample s: video of 2 frames has frames of different sizes; scale them"):
        _open((Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))))


def test_a_frame_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 1: image .*gone\.png does not exist"):
        check_video((tmp_path / "gone.png",), where="row 1")


def test_without_pyav_lists_of_frames_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    check_video((png(),), where="row 1")
    assert len(_open([png()]).frames) == 1
    with pytest.raises(InputError, match=r'row 1: video files need PyAV: pip install "exitsafe\[video\]"'):
        check_video(b"", where="row 1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (Image.new("RGB", (8, 8)),) * 2,
            "sample s: videos contains a Image; give each video as a Path, as bytes or as a",
        ),
        (([],), "sample s: videos contains an empty list"),
        (("a.mp4",), "sample s: videos contains a str"),
    ],
)
def test_videos_of_another_form(given: tuple[VideoSource, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sample(id="s", prompt="x", kind="benign", videos=given)
