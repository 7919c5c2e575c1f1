"""Tiny videos and recordings, made by the tests."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream


def encoded(
    frames: Sequence[npt.NDArray[np.uint8]], *, fps: int = 4, codec: str = "mpeg4", container: str = "mp4"
) -> bytes:
    """A video of these (height, width, 3) frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=fps))
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def mp4(
    num_frames: int = 4,
    *,
    fps: int = 4,
    size: tuple[int, int] = (32, 16),
    codec: str = "mpeg4",
    container: str = "mp4",
) -> bytes:
    """A video whose frames get brighter by 5 of 255."""
    frames = [np.full((size[1], size[0], 3), 5 * number, np.uint8) for number in range(num_frames)]
    return encoded(frames, fps=fps, codec=codec, container=container)


def tone(hertz: float, rate: int, *, seconds: float = 0.1) -> npt.NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def wav(channels: Sequence[npt.NDArray[np.float32]] = (tone(440, 16_000),), rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.stack(channels, axis=1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()
