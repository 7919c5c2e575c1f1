"""Videos: checked, and opened as evenly spaced RGB frames, so that a model sees what a player shows."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from exitsafe.data.images import MAX_ASPECT_RATIO, as_seen, check_image, is_pipe, open_image
from exitsafe.errors import InputError
from exitsafe.records import Sample, VideoSource

if TYPE_CHECKING:
    from types import ModuleType

    from av import VideoFrame
    from av.container import InputContainer

MAX_FRAMES = 32
"""Frames per video that a model reads, unless the caller asks for another number."""
ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
_LISTED_FPS = 2.0  # of a list of frames, as in Qwen's own loader
_MOST_FRAMES = 36_000  # twenty minutes at 30 frames per second
_MOST_PIXELS = 4096 * 2304
# A playlist, or a subtitle track that claims to be one, can make FFmpeg read other files and URLs.
_OPTIONS = {"format_whitelist": "mov,matroska,avi,gif", "protocol_whitelist": "none"}
_TURNS = {  # by rotation in degrees, anticlockwise
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """A video as a model reads it.

    Args:
        frames: At least one RGB frame, upright, all of one size.
        fps: Frames per second of `frames`, not of the file: frame i is shown at i / fps seconds.
    """

    frames: list[Image.Image]
    fps: float


def open_videos(sample: Sample, *, max_frames: int = MAX_FRAMES) -> list[Video]:
    """The videos of a sample, in order.

    Of n frames, k = min(n, max_frames) are kept: those at floor(i * n / k), i = 0 to k - 1. A list of frames counts as
    2 frames per second.

    Args:
        sample: The sample.
        max_frames: The most frames to keep of each video.

    Raises:
        InputError: If a video cannot be read, is implausibly large or long, or has frames of different sizes, or if
            PyAV is not installed.
    """
    return [_open_video(video, max_frames, sample.id) for video in sample.videos]


def check_video(video: VideoSource, *, where: str) -> None:
    """Check a video without decoding all of it, so that a broken file is found before the model is loaded.

    Of a file the first frame is decoded and the others are counted; of a list every frame is decoded.

    Raises:
        InputError: If it is missing, not a video, or implausibly large or long, or if PyAV is not installed.
    """
    if isinstance(video, tuple):
        for frame in video:
            if isinstance(frame, Path | bytes):
                check_image(frame, where=where)
    else:
        _count(video, where=where)
        _decode(video, [0], where=where)


def _open_video(video: VideoSource, max_frames: int, sample_id: str) -> Video:
    where = f"sample {sample_id}"
    if isinstance(video, tuple):
        rate, num_frames = _LISTED_FPS, len(video)
        frames = [open_image(video[place], sample_id) for place in _evenly(num_frames, max_frames)]
    else:
        rate, num_frames = _count(video, where=where)
        frames = _decode(video, _evenly(num_frames, max_frames), where=where)
    if len({frame.size for frame in frames}) > 1:
        raise InputError(f"{where}: video {_name(video)} has frames of different sizes; scale them to one size")
    return Video(frames=frames, fps=rate * min(num_frames, max_frames) / num_frames)


def _evenly(num_frames: int, max_frames: int) -> list[int]:
    kept = min(num_frames, max_frames)
    return [place * num_frames // kept for place in range(kept)]


def _count(video: Path | bytes, *, where: str) -> tuple[float, int]:
    """Frames per second of a file, and how many there are, without decoding them; its header may not be right."""
    with _opened(video, where=where) as container:
        packets = islice(container.demux(video=0), _MOST_FRAMES + 2)
        num_frames = sum(packet.size > 0 for packet in packets)
        rate = float(container.streams.video[0].average_rate or 0)
    if num_frames > _MOST_FRAMES:
        raise InputError(f"{where}: video {_name(video)} has more than {_MOST_FRAMES} frames; cut it")
    return rate if math.isfinite(rate) and rate > 0 else _LISTED_FPS, num_frames


def _decode(video: Path | bytes, wanted: Sequence[int], *, where: str) -> list[Image.Image]:
    """The frames at these places, or those of them that exist."""
    with _opened(video, where=where) as container:
        decoded = islice(enumerate(container.decode(video=0)), wanted[-1] + 1 if wanted else 0)
        frames = [_as_seen(frame) for place, frame in decoded if place in set(wanted)]
    if not frames:
        raise InputError(f"{where}: video {_name(video)} has no frames; replace it or remove the row")
    return frames


@contextlib.contextmanager
def _opened(video: Path | bytes, *, where: str) -> Iterator[InputContainer]:
    """A file with a video stream, of which the first counts; errors inside the context name its sample."""
    av, name = _import_av(where), _name(video)
    if isinstance(video, Path) and is_pipe(video):  # opening it would wait for a writer
        raise InputError(f"{where}: video {name} is not a regular file; give the path of one")
    try:
        # an open file, because FFmpeg reads some names as instructions
        with (
            io.BytesIO(video) if isinstance(video, bytes) else video.open("rb") as file,
            av.open(file, options=_OPTIONS, metadata_errors="ignore") as container,
        ):
            if not container.streams.video:
                raise InputError(f"{where}: video {name} has no video stream; replace it or remove the row")
            stream = container.streams.video[0]
            short, long = sorted((stream.width, stream.height))
            if short * long > _MOST_PIXELS:
                raise InputError(f"{where}: video {name} is larger than 4K; scale it down")
            if long > MAX_ASPECT_RATIO * short:
                raise InputError(f"{where}: video {name} is implausibly elongated; crop it")
            # a later frame may have another size
            stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
            stream.thread_type = "AUTO"
            yield container
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: video {name} does not exist; add it or remove the row") from error
    except av.FFmpegError as error:
        kinds = ", ".join(ending[1:].upper() for ending in ENDINGS)
        raise InputError(f"{where}: video {name} cannot be read as {kinds}; convert or replace it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: video {name} cannot be read ({error}); replace it or remove the row") from error


def _as_seen(frame: VideoFrame) -> Image.Image:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    mode = "rgba" if has_alpha else "rgb24"
    image = as_seen(Image.fromarray(frame.to_ndarray(format=mode)))
    turn = _TURNS.get(frame.rotation)
    return image if turn is None else image.transpose(turn)


def _name(video: VideoSource) -> str:
    if isinstance(video, tuple):
        return f"of {len(video)} frames"
    return f"of {len(video)} bytes" if isinstance(video, bytes) else str(video)


def _import_av(where: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InputError(f'{where}: video files need PyAV: pip install "exitsafe[video]"') from error
    return av
