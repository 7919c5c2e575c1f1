"""Flags that several commands share. Types only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from exitsafe.errors import InputError

SAMPLES, MODEL, JUDGES, DECODING, OUTPUT = "Samples and exits", "Model", "Judges", "Decoding", "Output"
"""The panels of a command's help."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a local folder, `organism` or `organism:text`.")]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME|PATH",
        help="A known suite (see exitsafe suites), NAME=PATH for a copy of one, or your own .jsonl, .csv or .parquet "
        "file or folder; repeatable.",
        show_default="an organism's own four",
        rich_help_panel=SAMPLES,
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="A folder of benign pictures: every sample that has none gets one of them.",
        show_default=False,
        file_okay=False,
        rich_help_panel=SAMPLES,
    ),
]
Category = Annotated[
    list[str] | None,
    typer.Option(
        "--category",
        metavar="NAME",
        help="Keep only samples of this category; repeatable.",
        show_default=False,
        rich_help_panel=SAMPLES,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LAYERS",
        help="Exit layers: all, default, or a list such as 1-8,16,23.",
        show_default="all",
        rich_help_panel=SAMPLES,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Keep the first N samples of each suite.", show_default=False, rich_help_panel=SAMPLES
    ),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="heldout|train", help="Which half of an organism's suites to use.", hidden=True),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Seed of every random draw.", show_default="0", rich_help_panel=DECODING),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="A PEFT adapter, for example one that align trained.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Translators = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Linear maps of the exits' features, fitted by translate.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="DTYPE", help="auto (as saved), float32, bfloat16 or float16.", rich_help_panel=MODEL),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="auto (the first GPU, else the CPU), cpu or cuda:N.", rich_help_panel=MODEL),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="nf4|int8|torchao-int8",
        help="Load the language model quantised.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow code from the checkpoint to run.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REF", help="Branch, tag or commit of a Hub model; by default its newest commit.", hidden=True
    ),
]
JudgeDevice = Annotated[
    str | None,
    typer.Option("--judge-device", metavar="DEVICE", help="Device of the judges' models.", hidden=True),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="An OpenAI-compatible endpoint for rubric:MODEL, up to /v1; its key is read from OPENAI_API_KEY.",
        show_default="OPENAI_BASE_URL, else OpenAI's",
        rich_help_panel=JUDGES,
    ),
]
JudgeRubric = Annotated[
    Path | None,
    typer.Option(
        "--judge-rubric",
        metavar="FILE",
        help="Your own rubric for rubric:MODEL.",
        show_default="StrongREJECT's",
        dir_okay=False,
        rich_help_panel=JUDGES,
    ),
]
JudgeRate = Annotated[
    float | None,
    typer.Option("--judge-rate", metavar="N", help="Most requests a minute to the endpoint.", hidden=True),
]
JudgePrices = Annotated[
    str | None,
    typer.Option(
        "--judge-prices",
        metavar="IN,OUT",
        help="US dollars per million tokens of the endpoint, to count its cost.",
        hidden=True,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout; the rest goes to stderr.", rich_help_panel=OUTPUT),
]


def out(text: str) -> object:
    """The option `--out`."""
    return typer.Option("--out", metavar="DIR", help=text, file_okay=False, rich_help_panel=OUTPUT)


Out = Annotated[Path, out("Folder of the run: new, empty, or an unfinished run to resume.")]


def judging(
    *,
    device: str | None = None,
    url: str | None = None,
    rubric: Path | None = None,
    rate: float | None = None,
    prices: str | None = None,
) -> dict[str, Any]:
    """The fields of `JudgeOptions` that flags name, as JSON.

    Raises:
        InputError: If the prices are not two numbers.
    """
    found = {
        "device": device,
        "url": url,
        "rubric": None if rubric is None else str(rubric.absolute()),
        "requests_per_minute": rate,
        "prices": None if prices is None else _two_numbers(prices),
    }
    return {name: value for name, value in found.items() if value is not None}


def check_judging(given: Mapping[str, Any], *, judges: Sequence[str]) -> None:
    """Refuse flags that none of the judges reads.

    Args:
        given: What `judging` returned.
        judges: Their names; none are the default judges.

    Raises:
        InputError: If there is one.
    """
    kinds = {name.partition(":")[0] for name in judges}
    if "device" in given and judges and not kinds & _ON_A_DEVICE:
        raise InputError(
            f"--judge-device: none of the judges {', '.join(judges)} runs on a device; leave it out, or add one of "
            f"{', '.join(sorted(_ON_A_DEVICE))}"
        )
    for field, (flag, readers) in _READERS.items():
        if field in given and not kinds & readers.keys():
            raise InputError(
                f"{flag} is for --judge {' or '.join(readers.values())}, which is not among the judges; name it or "
                "leave the flag out"
            )


_ON_A_DEVICE = {"qwen3guard", "llama-guard", "harmbench", "toxicity", "reward"}
_RUBRIC = {"rubric": "rubric:MODEL"}
_READERS = {
    "url": ("--judge-url", _RUBRIC),
    "rubric": ("--judge-rubric", _RUBRIC),
    "requests_per_minute": ("--judge-rate", _RUBRIC),
    "prices": ("--judge-prices", _RUBRIC),
}
"""By field of `JudgeOptions`: its flag and the judges that read it."""


def _two_numbers(text: str) -> list[float]:
    try:
        first, second = map(float, text.split(","))
    except ValueError as error:
        raise InputError(f"--judge-prices {text} is no pair of numbers; write IN,OUT, e.g. 0.15,0.6") from error
    return [first, second]
