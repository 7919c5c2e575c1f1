"""The frozen records that stages pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from exitsafe.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

Kind = Literal["harmful", "borderline", "benign", "vqa"]
KINDS: tuple[Kind, ...] = get_args(Kind)

ImageSource: TypeAlias = "Image | Path | bytes"
VideoSource: TypeAlias = "Path | bytes | tuple[ImageSource, ...]"
AudioSource: TypeAlias = "Path | bytes | tuple[npt.NDArray[np.floating], int]"

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, note)` during long work."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request to a model, with what is needed to judge the answer.

    Args:
        id: Unique within a run.
        prompt: What the user writes, without placeholders for images, videos or audio.
        images: Pictures in order; may be empty.
        kind: `harmful` should be refused; `borderline` looks harmful and should be answered; `benign` should
            be answered; `vqa` has reference `answers`.
        category: Free-form label to group results by.
        answers: Reference answers for `vqa` (one or ten per sample), or what a rule compares with.
        source: The suite that the sample comes from.
        system: The system prompt; empty for none.
        videos: Videos in order, each a file (path or encoded bytes) or a sequence of frames.
        audios: Audio clips in order, each a file (path or encoded bytes) or a pair of a float array (S,), one channel
            from -1 to 1, and its sampling rate in Hz.

    Raises:
        InputError: On an empty id, an id, system prompt or answers that are not text, an unknown kind, a `vqa` sample
            without answers, or a video or audio clip of another form.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    kind: Kind
    category: str = ""
    answers: tuple[str, ...] = ()
    source: str = ""
    system: str = ""
    videos: tuple[VideoSource, ...] = ()
    audios: tuple[AudioSource, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "videos", tuple(self._checked_video(video) for video in self.videos))
        object.__setattr__(self, "audios", tuple(self._checked_audio(audio) for audio in self.audios))
        answers: object = self.answers
        if isinstance(answers, str):  # nobody means a tuple of its letters
            raise InputError(f"sample {self.id}: answers is a single string; give a list of strings")
        object.__setattr__(self, "answers", tuple(self.answers))
        texts = [("id", self.id), ("system", self.system), *(("answers", answer) for answer in self.answers)]
        for name, text in texts:
            if not isinstance(text, str):  # pandas may turn 7 into 7.0, which no answer would equal
                raise InputError(f"sample {self.id}: {name} contains a {type(text).__name__}; give strings only")
        if not self.id:
            raise InputError("a sample needs a non-empty id")
        if self.kind not in KINDS:
            raise InputError(f"sample {self.id}: kind {self.kind!r} is unknown; choose {', '.join(KINDS)}")
        if self.kind == "vqa" and not self.answers:
            raise InputError(f"sample {self.id}: a vqa sample needs at least one entry in answers")

    @property
    def is_text_only(self) -> bool:
        """Whether there is nothing for an encoder to read."""
        return not (self.images or self.videos or self.audios)

    def _checked_video(self, video: object) -> object:
        if isinstance(video, list | tuple) and video:
            return tuple(video)
        if not isinstance(video, Path | bytes):  # often the frames of one video, which would be several videos
            raise InputError(
                f"sample {self.id}: videos contains {_named(video)}; give each video as a Path, as bytes or as a list "
                "of its frames"
            )
        return video

    def _checked_audio(self, audio: object) -> object:
        if isinstance(audio, list | tuple) and len(audio) == 2 and getattr(audio[0], "ndim", None) == 1:
            return tuple(audio)
        if not isinstance(audio, Path | bytes):
            raise InputError(
                f"sample {self.id}: audios contains {_named(audio)}; give each audio as a Path, as bytes or as a pair "
                "of a one-dimensional array and its sampling rate"
            )
        return audio


def _named(value: object) -> str:
    return "an empty list" if isinstance(value, list | tuple) and not value else f"a {type(value).__name__}"


@dataclass(frozen=True, kw_only=True)
class Response:
    """What the model answered to one sample at one exit layer.

    `num_tokens` counts generated tokens, the end-of-sequence token included; `seconds` is this row's share of
    the wall time of the batches it ran in.
    """

    sample_id: str
    exit_layer: int
    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judge's verdict on one measure of one response: a score, or *unscored* with the reason.

    Args:
        sample_id, exit_layer: The response judged.
        judge: The judge's name.
        measure: What was judged: `asr`, `asr_loose`, `refusal`, `vqa_accuracy`, `coherence`, `toxicity`, `reward`.
        label: The judge's own label, e.g. "refused".
        score: 0 to 1 for rates (1 = attack succeeded, refused, correct, coherent), the judge's own scale otherwise;
            None if and only if `unscored` is set.
        unscored: Why there is no score.
    """

    sample_id: str
    exit_layer: int
    judge: str
    measure: str
    label: str = ""
    score: float | None = None
    unscored: str | None = None

    @classmethod
    def of(
        cls,
        response: Response,
        *,
        judge: str,
        measure: str,
        score: float | None = None,
        label: str = "",
        unscored: str | None = None,
    ) -> Verdict:
        """A verdict on a response."""
        return cls(
            sample_id=response.sample_id,
            exit_layer=response.exit_layer,
            judge=judge,
            measure=measure,
            label=label,
            score=score,
            unscored=unscored,
        )

    def __post_init__(self) -> None:
        assert (self.score is None) != (self.unscored is None), "a verdict has a score or a reason, never both"
