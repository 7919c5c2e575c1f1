"""What several commands take: a model and how to load it, samples, exits, and how judges are reached."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from exitsafe.specs.spec import Flag, Key, Spec

SAMPLES, MODEL, JUDGES, DECODING, OUTPUT = "Samples and exits", "Model", "Judges", "Decoding", "Output"
"""The groups of a command's help."""

Count = Annotated[int, Field(ge=1, le=2**31)]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8", "torchao-int8"]

Model = Annotated[str, Flag("A Hub id, a local folder, `organism` or `organism:text`.", "MODEL", is_argument=True)]
ModelOrURL = Annotated[
    str,
    Flag(
        "A Hub id, a local folder, `organism` or `organism:text`; or a served model, as `http://host:port/v1#NAME`.",
        "MODEL",
        is_argument=True,
    ),
]
Run = Annotated[Path, Flag("A finished run.", "RUN", is_argument=True)]
Layers = Annotated[
    str, Flag("Exit layers: all, default, or a list such as 1-8,16,23.", "LAYERS", name="layers", panel=SAMPLES)
]
Seed = Annotated[int, Field(ge=0, lt=2**64), Flag("Seed of every random draw.", panel=DECODING)]
TrustRemoteCode = Annotated[bool, Flag("Allow code from the checkpoint to run.", panel=MODEL)]
SkipGlobal = Annotated[bool, Key("Llama 3.2 Vision: skip the global blocks too (true or false).")]
Engine = Annotated[
    str | None,
    Flag(
        "A vLLM server that generates the answers, started with --enable-mm-embeds; only the encoder runs here. Add "
        "#NAME to choose one of its models.",
        "URL",
        panel=MODEL,
        default="answers are generated in this process",
    ),
]
Suites = Annotated[
    tuple[str, ...],
    Flag(
        "A known suite (see exitsafe suites), NAME=PATH for a copy of one, or your own .jsonl, .csv or .parquet file "
        "or folder; repeatable.",
        "NAME|PATH",
        name="suite",
        panel=SAMPLES,
        default="an organism's own four",
    ),
]


def is_url(model: str) -> bool:
    """Whether a model is a server's address."""
    return re.match(r"https?://", model) is not None


def _pair(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


class Samples(Spec):
    """Which samples to read."""

    panel: ClassVar[str] = SAMPLES

    suites: Suites = ()
    images: Annotated[
        Path | None, Flag("A folder of benign pictures: every text-only sample gets one of them.", "DIR")
    ] = None
    categories: Annotated[
        tuple[str, ...] | None, Key("Keep only samples of these categories (a list).", "category")
    ] = None
    limit: Annotated[Count | None, Flag("Keep the first N samples of each suite.")] = None


class Loading(Spec):
    """How to load a model: arguments of `load_vlm`."""

    panel: ClassVar[str] = MODEL

    revision: Annotated[str | None, Key("Branch, tag or commit of a Hub model; by default its newest commit.")] = None
    dtype: Annotated[DType, Flag("auto (as saved), float32, bfloat16 or float16.", "DTYPE")] = "auto"
    device: Annotated[str, Flag("auto (the first GPU, else the CPU), cpu or cuda:N.", "DEVICE")] = "auto"
    encoder: Annotated[
        Literal["image", "audio"], Flag("The encoder whose exits to use; the image encoder also encodes video.")
    ] = "image"
    trust_remote_code: TrustRemoteCode = False


class QuantizedLoading(Loading):
    """As `Loading`, and quantised."""

    quantization: Annotated[
        Quantization | None, Flag("Load the language model quantised.", "nf4|int8|torchao-int8")
    ] = None


class ContinuedLoading(QuantizedLoading):
    """As `QuantizedLoading`, with an adapter to train further."""

    adapter: Annotated[
        str | None, Flag("A PEFT adapter of the language model to continue training from.", "DIR", default="a new one")
    ] = None


class AdaptedLoading(Loading):
    """As `Loading`, with an adapter and translators."""

    adapter: Annotated[str | None, Flag("A PEFT adapter, for example one that align trained.", "DIR")] = None
    translators: Annotated[str | None, Flag("Linear maps of the exits' features, fitted by translate.", "DIR")] = None


class FullLoading(AdaptedLoading, QuantizedLoading):
    """All arguments of `load_vlm`."""


class JudgeOptions(Spec):
    """Where judges find their model or endpoint.

    Args:
        url: Base URL of an OpenAI-compatible endpoint; None takes OPENAI_BASE_URL, else OpenAI's own.
        rubric: A file with a custom rubric; None takes StrongREJECT's.
        device: For local models: "auto" (this process's GPU, else the CPU), or e.g. "cuda:1".
        requests_per_minute: The endpoint's rate limit, shared by all processes; None for no limit.
        prices: US dollars per million tokens in and out, to count what the endpoint costs; None counts tokens only.
    """

    panel: ClassVar[str] = JUDGES

    url: Annotated[
        str | None,
        Flag(
            "An OpenAI-compatible endpoint for rubric:MODEL, up to /v1; its key is read from OPENAI_API_KEY.",
            "URL",
            name="judge-url",
            default="OPENAI_BASE_URL, else OpenAI's",
        ),
    ] = None
    rubric: Annotated[
        Path | None,
        AfterValidator(lambda path: path and path.absolute()),
        Key("File with your own rubric for rubric:MODEL, instead of StrongREJECT's.", "judge-rubric"),
    ] = None
    device: Annotated[str, Key("Device of the judges' models.", "judge-device")] = "auto"
    requests_per_minute: Annotated[
        float | None, Field(gt=0), Key("Maximum requests per minute to the endpoint.", "judge-rate")
    ] = None
    prices: Annotated[
        tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None,
        BeforeValidator(_pair),
        Field(description="two numbers IN,OUT such as 0.15,0.6"),
        Key("US dollars per million tokens in and out of the endpoint, to count its cost.", "judge-prices"),
    ] = None
