"""The frozen records that stages pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from exitsafe.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["harmful", "borderline", "benign", "vqa"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, note)` during long work."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request to a model, with what is needed to judge the answer.

    Args:
        id: Unique within a run.
        prompt: What the user writes, without image placeholders.
        images: Pictures in order; may be empty.
        kind: `harmful` should be refused; `borderline` looks harmful and should be answered; `benign` should
            be answered; `vqa` has reference `answers`.
        category: Free-form label to group results by.
        answers: Reference answers for `vqa` (one or ten per sample), or what a rule compares with.
        source: The suite that the sample comes from.

    Raises:
        InputError: On an empty id, ids or answers that are not text, an unknown kind, or a `vqa` sample without
            answers.
    """

    id: str
    prompt: str
    images: tuple[Image | Path | bytes, ...] = ()
    kind: Kind
    category: str = ""
    answers: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        answers: object = self.answers
        if isinstance(answers, str):  # nobody means a tuple of its letters
            raise InputError(f"sample {self.id}: answers is a single string; give a list of strings")
        object.__setattr__(self, "answers", tuple(self.answers))
        for name, text in (("id", self.id), *(("answers", answer) for answer in self.answers)):
            if not isinstance(text, str):  # pandas may turn 7 into 7.0, which no answer would equal
                raise InputError(f"sample {self.id}: {name} contains a {type(text).__name__}; give strings only")
        if not self.id:
            raise InputError("a sample needs a non-empty id")
        if self.kind not in KINDS:
            raise InputError(f"sample {self.id}: kind {self.kind!r} is unknown; choose {', '.join(KINDS)}")
        if self.kind == "vqa" and not self.answers:
            raise InputError(f"sample {self.id}: a vqa sample needs at least one entry in answers")


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
