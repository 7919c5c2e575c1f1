from __future__ import annotations

import io
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from exitsafe.data import audios
from exitsafe.data.audios import check_audio, open_audios
from exitsafe.errors import InputError
from exitsafe.records import AudioSource, Sample
from tests.data.recordings import mp4, tone, wav


def _open(audio: Any, rate: int = 16_000) -> npt.NDArray[np.float32]:
    (found,) = open_audios(Sample(id="s", prompt="x", kind="benign", audios=(audio,)), rate)
    return found


def _encoded(format: str, rate: int = 16_000) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(440, rate), rate, format=format)
    return buffer.getvalue()


def test_a_wav_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    for audio in (tmp_path / "a.wav", wav()):
        found = _open(audio)
        assert (found.dtype, found.shape) == (np.dtype(np.float32), (1600,))
        np.testing.assert_allclose(found, tone(440, 16_000), atol=1e-4)


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_other_formats(format: str) -> None:  # noqa: A002
    found = _open(_encoded(format))
    assert found.dtype == np.dtype(np.float32)
    assert 1600 <= len(found) <= 3000
    assert 0.4 < np.abs(found).max() < 0.6


def test_channels_are_averaged() -> None:
    left, right = tone(440, 16_000), np.zeros(1600, np.float32)
    np.testing.assert_allclose(_open(wav([left, right])), left / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_the_sampling_rate_is_converted(rate: int) -> None:
    """A tone stays the same tone: away from the ends it equals one made at the other rate."""
    found = _open(wav([tone(440, rate)], rate))
    assert found.dtype == np.float32
    assert len(found) == pytest.approx(1600, abs=2)
    np.testing.assert_allclose(found[200:1400], tone(440, 16_000)[200:1400], atol=2e-3)


def test_an_array_is_read_at_its_own_rate() -> None:
    same = _open((tone(440, 16_000).astype(np.float64), 16_000))
    np.testing.assert_array_equal(same, tone(440, 16_000))
    np.testing.assert_array_equal(_open((tone(440, 48_000), 48_000)), _open_resampled())


def _open_resampled() -> npt.NDArray[np.float32]:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(440, 48_000), 48_000, format="WAV", subtype="FLOAT")
    return _open(buffer.getvalue())


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (b"", "audio of 0 bytes cannot be read as WAV, FLAC, OGG, MP3; convert or replace it"),
        (b"rubbish" * 100, "cannot be read as WAV"),
        (mp4(), "cannot be read as WAV"),
        (_encoded("FLAC")[:500], "cannot be read as WAV"),
        (_encoded("AIFF"), "is AIFF .*; convert it to WAV"),
        (wav([np.zeros(0, np.float32)]), "is empty; replace it"),
        (wav(rate=500), "has a sampling rate of 500 Hz; convert it to 16000 Hz"),
        (wav(rate=400_000), "has a sampling rate of 400000 Hz"),
        ((np.array([0.0, np.nan]), 16_000), "audio of 2 values has values that are not finite"),
        ((np.array([1, 2], np.int16), 16_000), "is of type int16; convert it to floats from -1 to 1"),
        ((tone(440, 16_000), 2**31 - 1), "has a sampling rate of 2147483647 Hz"),
    ],
    ids=["empty", "rubbish", "video", "torn", "aiff", "silent", "slow", "fast", "nan", "integers", "huge-rate"],
)
def test_what_is_no_recording_is_one_clear_line(audio: AudioSource, message: str) -> None:
    with pytest.raises(InputError, match=f"^row 7: audio .*{message.removeprefix('audio ')}") as caught:
        check_audio(audio, where="row 7")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^sample s: audio "):
        _open(audio)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    for name, message in (
        ("gone.wav", r"row 1: audio .*gone\.wav does not exist; add it or remove the row"),
        ("pipe.wav", r"row 1: audio .*pipe\.wav is not a regular file; give the path of one"),
        (".", r"row 1: audio .* cannot be read \(.*directory"),
    ):
        with pytest.raises(InputError, match=message):
            check_audio(tmp_path / name, where="row 1")


def test_long_recordings_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audios, "_MOST_VALUES", 3200)
    check_audio(wav([tone(440, 16_000)] * 2), where="row 1")
    with pytest.raises(InputError, match=r"row 1: audio of .* bytes is implausibly long; cut it"):
        check_audio(wav([tone(440, 16_000)] * 3), where="row 1")


def test_a_header_that_promises_more_than_there_is_costs_no_memory() -> None:
    content = bytearray(_encoded("FLAC"))
    place = content.index(b"fLaC") + 8 + 13  # the low 32 bits of the number of values
    content[place : place + 4] = struct.pack(">I", 2**32 - 1)
    with pytest.raises(InputError, match="is implausibly long; cut it"):
        check_audio(bytes(content), where="row 1")


def test_without_soundfile_arrays_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert len(_open((tone(440, 16_000), 16_000))) == 1600
    with pytest.raises(InputError, match=r'row 1: audio files need soundfile: pip install "exitsafe\[audio\]"'):
        check_audio(wav(), where="row 1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((tone(440, 16_000),), "sample s: audios contains a ndarray; give each audio as a Path, as bytes or as a pair"),
        (((tone(440, 16_000)[None], 16_000),), "sample s: audios contains a tuple"),
        (("a.wav",), "sample s: audios contains a str"),
    ],
)
def test_audios_of_another_form(given: tuple[AudioSource, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sample(id="s", prompt="x", kind="benign", audios=given)
