"""The schema of run.json, checked once on reading so that readers may rely on it.

Other fields are allowed and kept as they are, but no reader may rely on them.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from exitsafe.judges import MEASURES
from exitsafe.untrusted import JsonObject, UnreadableError

FORMAT = 4
RESULTS = ("responses.parquet", "verdicts.parquet", "summary.json")
"""The files of a finished run whose hashes are in run.json."""


def _check_text(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain a null character")
    return text


def _check_date(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise ValueError("must be a date such as 2026-01-31") from error
    return text


def _check_measure(measure: str) -> str:
    if measure not in MEASURES:
        raise ValueError(f"must be one of {', '.join(MEASURES)}")
    return measure


def _check_layers(layers: list[int]) -> list[int]:
    if layers != sorted(set(layers)):
        raise ValueError("must be ascending")
    return layers


_Text = Annotated[str, Field(max_length=4096), AfterValidator(_check_text)]
_Count = Annotated[int, Field(ge=0, le=2**63)]
_Depth = Annotated[int, Field(ge=0, le=1000)]  # 0 for a served model, whose encoder is unknown
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Share = Annotated[float, Field(gt=0, lt=1)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Model(_Open):
    name: _Text
    family: _Text
    encoder: Literal["image", "audio"]
    num_layers: _Depth
    default_exit: _Depth
    checkpoint: _Text | None
    adapter: _Text | None


class _Data(_Open):
    samples: Annotated[int, Field(ge=1)]
    sources: dict[str, Annotated[int, Field(ge=1)]]
    hash: _Hash


class _Decoding(_Open):
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31)]
    temperature: Annotated[float, Field(ge=0)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _TrainedOn(_Closed):
    samples: _Count
    of: _Count


class _Prompts(_Open):
    hash: _Text
    today: Annotated[_Text, AfterValidator(_check_date)] | None = None


class _Engine(_Open):
    name: _Text
    version: _Text
    model: _Text


class _StopWhen(_Closed):
    max_asr: _Share
    error: _Share


class _Judge(_Open):
    name: Annotated[_Text, Field(min_length=1)]
    measures: list[Annotated[str, AfterValidator(_check_measure)]]
    settings: dict[str, object]
    proxy: dict[_Text, _Text] = {}


class _Settings(_Open):
    model: _Model
    data: _Data
    trained_on: _TrainedOn | None = None
    prompts: _Prompts | None = None
    engine: _Engine | None = None
    exit_layers: Annotated[list[_Depth], Field(min_length=1), AfterValidator(_check_layers)]
    skip_global: bool
    decoding: _Decoding
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=2**31)]
    stop_when: _StopWhen | None
    judges: list[_Judge]
    versions: dict[str, str]

    def check(self) -> None:
        """Check what involves several fields."""
        is_served = self.model.num_layers == self.model.default_exit == 0
        if is_served and len(self.exit_layers) > 1:
            raise UnreadableError("a served model has more than one exit")
        if not is_served and min(self.exit_layers[0], self.model.default_exit) < 1:
            raise UnreadableError("an exit is below the encoder's first block")
        if not is_served and max(self.exit_layers[-1], self.model.default_exit) > self.model.num_layers:
            raise UnreadableError(f"an exit is beyond the {self.model.num_layers} blocks of the encoder")
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise UnreadableError("a judge is listed twice")
        if self.stop_when is not None and not any("asr" in judge.measures for judge in self.judges):
            raise UnreadableError("it stopped early without a judge that measures attack success")


class _Hub(_Closed):
    id: _Text
    configs: list[_Text]
    split: _Text
    revision: _Text


class _Loading(_Closed):
    adapter: _Text | None = None
    translators: _Text | None = None
    revision: _Text | None = None
    dtype: _Text = "auto"
    device: _Text = "auto"
    encoder: Literal["image", "audio"] = "image"
    quantization: _Text | None = None
    trust_remote_code: bool = False


class _Judging(_Closed):
    device: _Text = "auto"
    url: _Text | None = None
    rubric: _Text | None = None
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    prices: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None


class _Origin(_Open):
    model: _Text | None = None
    suites: list[_Text] | None = None
    split: _Text = "heldout"
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    organism: _Text = "organism"
    images: _Text | None = None
    categories: list[_Text] | None = None
    hub: dict[str, _Hub] | None = None
    loading: _Loading = _Loading()
    judging: _Judging = _Judging()
    judge_pass: Literal["beside", "second"] = "beside"
    replaced_judges: dict[_Text, _Text] = {}


class _Results(_Closed):
    settings: _Hash
    origin: _Hash
    files: dict[Literal["responses.parquet", "verdicts.parquet", "summary.json"], _Hash]


class _State(_Open):
    settings: _Settings
    origin: _Origin
    results: _Results | None = None


class _Head(_State):
    next: _State | None = None


def check_head(content: JsonObject) -> None:
    """Check that a JSON object is a valid run.json of this format.

    Raises:
        UnreadableError: At the first error.
    """
    try:
        head = _Head.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise UnreadableError(f"{where}: {fault['msg']}") from error
    if head.next is not None and (head.results is None or head.next.results is None):
        raise UnreadableError("it refers to other results without hashes")
    for state in (head, head.next):
        if state is not None:
            state.settings.check()
            if state.results is not None and state.results.files.keys() != set(RESULTS):
                raise UnreadableError(f"it has no hash of {', '.join(set(RESULTS) - state.results.files.keys())}")
