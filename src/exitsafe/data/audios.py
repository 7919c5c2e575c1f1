"""Audio: checked, and opened as one channel at the sampling rate that a model asks for."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exitsafe.data.images import is_pipe
from exitsafe.errors import InputError
from exitsafe.records import AudioSource, Sample

if TYPE_CHECKING:
    from types import ModuleType

ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")  # of soundfile; WAVEX is WAV with more in its header
_RATES = range(1_000, 384_001)  # Hz; resampling between odd larger ones would need filters of gigabytes
_MOST_VALUES = 100_000_000  # samples of all channels: 17 minutes of 48 kHz stereo
Waveform = npt.NDArray[np.float32]


def open_audios(sample: Sample, sampling_rate: int) -> list[Waveform]:
    """The audio clips of a sample, in order: one channel of floats (S,) each, from about -1 to 1.

    Channels are averaged; other sampling rates are converted by a polyphase filter.

    Args:
        sample: The sample.
        sampling_rate: The rate to convert to, in Hz.

    Raises:
        InputError: If a clip cannot be read, is empty, implausibly long or not finite, or soundfile is not installed.
    """
    where = f"sample {sample.id}"
    return [_resampled(*_read(audio, where=where), sampling_rate) for audio in sample.audios]


def check_audio(audio: AudioSource, *, where: str) -> None:
    """Decode an audio clip once and discard it, so that a broken file is found before the model is loaded.

    Raises:
        InputError: As `open_audios`.
    """
    _read(audio, where=where)


def _read(audio: AudioSource, *, where: str) -> tuple[Waveform, int]:
    """One channel (S,), and its sampling rate."""
    name = _name(audio)
    values, rate = audio if isinstance(audio, tuple) else _decode(audio, where=where)
    if not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"{where}: audio {name} is of type {values.dtype}; convert it to floats from -1 to 1")
    if rate not in _RATES:
        raise InputError(f"{where}: audio {name} has a sampling rate of {rate} Hz; convert it to 16000 Hz")
    if not len(values):
        raise InputError(f"{where}: audio {name} is empty; replace it or remove the row")
    if not np.isfinite(values).all():
        raise InputError(f"{where}: audio {name} has values that are not finite; record or export it again")
    return values.astype(np.float32), int(rate)


def _decode(audio: Path | bytes, *, where: str) -> tuple[Waveform, int]:
    soundfile, name = _import_soundfile(where), _name(audio)
    if isinstance(audio, Path) and is_pipe(audio):  # opening it would wait for a writer
        raise InputError(f"{where}: audio {name} is not a regular file; give the path of one")
    try:
        with (
            io.BytesIO(audio) if isinstance(audio, bytes) else audio.open("rb") as file,
            soundfile.SoundFile(file) as recording,
        ):
            if recording.format not in _FORMATS:
                raise InputError(f"{where}: audio {name} is {recording.format_info}; convert it to WAV")
            if recording.frames * recording.channels > _MOST_VALUES:
                raise InputError(f"{where}: audio {name} is implausibly long; cut it")
            values: Waveform = recording.read(dtype="float32", always_2d=True)  # (S, channels)
            return values.mean(axis=1), recording.samplerate
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: audio {name} does not exist; add it or remove the row") from error
    except soundfile.SoundFileError as error:
        kinds = ", ".join(ending[1:].upper() for ending in ENDINGS)
        raise InputError(f"{where}: audio {name} cannot be read as {kinds}; convert or replace it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: audio {name} cannot be read ({error}); replace it or remove the row") from error


def _resampled(values: Waveform, rate: int, wanted: int) -> Waveform:
    if rate == wanted:
        return values
    from scipy.signal import resample_poly

    shared = math.gcd(rate, wanted)
    resampled: Waveform = resample_poly(values, wanted // shared, rate // shared).astype(np.float32)
    return resampled


def _name(audio: AudioSource) -> str:
    if isinstance(audio, tuple):
        return f"of {len(audio[0])} values"
    return f"of {len(audio)} bytes" if isinstance(audio, bytes) else str(audio)


def _import_soundfile(where: str) -> ModuleType:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library libsndfile is missing
        raise InputError(f'{where}: audio files need soundfile: pip install "exitsafe[audio]"') from error
    library: ModuleType = soundfile
    return library
