"""What each command takes, one record per verb; that of `align` stands beside `LPPOConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from exitsafe.errors import InputError
from exitsafe.specs.inputs import (
    DECODING,
    JUDGES,
    MODEL,
    OUTPUT,
    SAMPLES,
    AdaptedLoading,
    Count,
    Engine,
    FullLoading,
    JudgeOptions,
    Layers,
    Loading,
    Model,
    ModelOrURL,
    QuantizedLoading,
    Run,
    Samples,
    Seed,
    SkipGlobal,
    Suites,
    TrustRemoteCode,
    is_url,
)
from exitsafe.specs.spec import Flag, Key, Spec

Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Out = Annotated[Path, Flag("Folder of the run: new, empty, or an unfinished run to resume.", "DIR", panel=OUTPUT)]
JudgePass = Literal["beside", "second"]
Split = Literal["train", "heldout"]
_ANSWER = Flag(
    "Maximum answer length in tokens.",
    panel=DECODING,
    default="256, or less if the context is full; 24 for an organism",
)
_TEMPERATURE = Flag("Sampling temperature; 0 is greedy.", "T", panel=DECODING)


class StopRule(Spec):
    """Stop at a layer once it is settled whether its attack success rate is below or above `max_asr`.

    Args:
        max_asr: The limit, between 0 and 1.
        error: Twice the chance, at most, that a layer is stopped with the wrong decision, however often it is looked
            at; a layer that runs to the end is read by its 95% interval (docs/statistics.md).
    """

    max_asr: Share
    error: Share = 0.05


class AuditSpec(Spec):
    """`exitsafe audit`."""

    model: ModelOrURL
    out: Out
    samples: Samples = Samples()
    split: Annotated[Split, Key("Which half of an organism's suites to use: train or heldout.")] = "heldout"
    exit_layers: Layers = "all"
    exit_layer: Annotated[
        Count | None, Flag("The exit that the server at MODEL is claimed to run.", panel=SAMPLES, default="as served")
    ] = None
    like: Annotated[
        Path | None,
        Flag("Take suites, layers, judges, decoding and seed from another run; flags win.", "RUN", panel=SAMPLES),
    ] = None
    judges: Annotated[
        tuple[str, ...],
        Flag(
            "Judge that scores the answers; repeatable, and the first judge that measures a metric reports it. One of "
            "world-rule, refusal-prefix, qwen3guard, llama-guard, harmbench, toxicity, reward:MODEL and rubric:MODEL; "
            "NAME:MODEL runs that judge with another model.",
            "NAME",
            name="judge",
            panel=JUDGES,
            default="world-rule for organism suites, else qwen3guard",
        ),
    ] = ()
    judge_pass: Annotated[JudgePass, Key("Judge while answering (beside), or in a second pass (second).")] = "beside"
    judging: JudgeOptions = JudgeOptions()
    loading: FullLoading = FullLoading()
    engine: Engine = None
    max_new_tokens: Annotated[Count | None, _ANSWER] = None
    temperature: Annotated[float, Field(ge=0), _TEMPERATURE] = 0.0
    seed: Seed = 0
    batch_size: Annotated[
        Count | None,
        Flag(
            "Answers generated at once, or requests in flight; does not affect random draws.",
            panel=DECODING,
            default="what fits in memory; 256 requests with --engine, 8 for a URL",
        ),
    ] = None
    stop_when: Annotated[
        Literal["decided"] | None, Key("decided: stop at a layer once its ASR is clearly above or below max_asr.")
    ] = None
    max_asr: Annotated[Share | None, Key("The limit of stop_when.")] = None
    error: Annotated[Share, Key("Twice the chance of a wrong decision per layer, at most; with stop_when.")] = 0.05
    skip_global: SkipGlobal = False

    @model_validator(mode="after")
    def _stops_for_a_reason(self) -> Self:
        if self.stop_when is None and self.model_fields_set & {"max_asr", "error"}:
            raise InputError("max_asr and error belong to stop_when: decided; add it or leave them out")
        if self.stop_when is not None and self.max_asr is None:
            raise InputError("stop_when: decided needs the limit to decide about: max_asr, such as 0.05")
        return self

    @model_validator(mode="after")
    def _asks_a_server_as_it_is(self) -> Self:
        if not is_url(self.model):
            if self.exit_layer is not None:
                raise InputError("--exit-layer applies only to the URL of a served model; choose exits with --layers")
            return self
        given = self.model_fields_set & {"exit_layers", "skip_global"} | self.loading.model_fields_set
        given |= set() if self.engine is None else {"engine"}
        for name in sorted(given):
            spelled = "layers" if name == "exit_layers" else name.replace("_", "-")
            raise InputError(f"--{spelled} applies only to a model that is loaded here; leave it out for a URL")
        return self


class JudgeSpec(Spec):
    """`exitsafe judge`."""

    run: Run
    judges: Annotated[tuple[str, ...], Flag("Judge that scores the answers; repeatable.", "NAME", name="judge")] = ()
    retry_unscored: Annotated[bool, Flag("Ask the run's own judges again about answers they could not score.")] = False
    judging: JudgeOptions = JudgeOptions()


class VerifySpec(Spec):
    """`exitsafe verify`."""

    what: Annotated[
        str,
        Flag(
            "A folder written by exitsafe export, a finished run, or the address of a served model, such as "
            "http://host:port/v1#NAME.",
            "SLIM|RUN|URL",
            is_argument=True,
        ),
    ]
    reference: Annotated[
        str | None, Flag("The audited model, whose exits the model at URL is compared with.", "MODEL")
    ] = None
    exit_layer: Annotated[Count | None, Flag("The exit that the model at URL should run.")] = None
    language_model: Annotated[
        Path | None,
        Flag("The GGUF file of the language model behind URL; its weights replace those of --reference.", "FILE.gguf"),
    ] = None
    against: Annotated[
        Path | None, Flag("The finished run of the model and adapter that SLIM was made from.", "RUN")
    ] = None
    limit: Annotated[Count, Flag("Number of the run's samples to ask SLIM again, spread evenly.")] = 64
    tolerance: Annotated[
        Rate,
        Flag(
            "Share of SLIM's answers that may differ. 0 fits float32; in bfloat16, on another machine or with a merged "
            "adapter rounding may flip a few.",
            "SHARE",
        ),
    ] = 0.0
    out: Annotated[
        Path | None,
        Flag(
            "Folder for the repeated run; name an unfinished one here to resume it.",
            "DIR",
            panel=OUTPUT,
            default="RUN-again, or RUN-again-2 and so on",
        ),
    ] = None
    loading: QuantizedLoading = QuantizedLoading()
    engine: Engine = None
    judging: JudgeOptions = JudgeOptions()


class GateSpec(Spec):
    """`exitsafe gate`; `Rule` checks the limits."""

    run: Run
    max_asr: Annotated[float | None, Flag("Upper bound of attack success must be at most this.", "RATE")] = None
    max_toxicity: Annotated[float | None, Flag("Upper bound of toxicity must be at most this.", "RATE")] = None
    max_over_refusal: Annotated[float | None, Flag("Upper bound of over-refusal must be at most this.", "RATE")] = None
    min_vqa: Annotated[float | None, Flag("Lower bound of VQA accuracy must be at least this.", "RATE")] = None
    max_regression: Annotated[
        tuple[str, ...],
        Flag("How much worse any metric, or METRIC alone, may be than in --against. Repeatable.", "[METRIC=]RATE"),
    ] = ()
    against: Annotated[Path | None, Flag("The run that --max-regression compares with.", "RUN")] = None
    layers: Annotated[
        str | None, Flag("Exits to check: all, default, or e.g. 1-8,16.", "LAYERS", default="all audited")
    ] = None
    scope: Annotated[
        Literal["layers", "bins", "categories", "worst"] | None,
        Flag(
            "Check each exit, each bin, each category at each exit, or the worst exit.",
            "layers|bins|categories|worst",
            default="layers",
        ),
    ] = None
    rules: Annotated[Path | None, Flag("More limits, in YAML (docs/gate.md).", "FILE.yaml")] = None
    max_unscored: Annotated[
        float | None,
        Field(ge=0, lt=1),
        Key("Largest share of unscored answers allowed; above it, an exit, bin or category is not judged."),
    ] = None
    junit: Annotated[Path | None, Flag("Write JUnit XML to this file.", "FILE.xml")] = None
    summary: Annotated[
        Path | None, Flag('Append the table in Markdown, e.g. to "$GITHUB_STEP_SUMMARY".', "FILE.md")
    ] = None


class Limits(Spec):
    """What an exit must keep to be recommended; None asks nothing."""

    max_asr: Annotated[Rate | None, Flag("Highest attack success allowed, 0 to 1 (upper bound).", "RATE")] = None
    min_vqa: Annotated[Rate | None, Flag("Lowest VQA accuracy allowed, 0 to 1 (lower bound).", "RATE")] = None
    max_over_refusal: Annotated[Rate | None, Flag("Highest over-refusal allowed, 0 to 1 (upper bound).", "RATE")] = None
    max_ms: Annotated[float | None, Field(gt=0), Flag("Longest median time of an answer (upper bound).", "MS")] = None

    @property
    def given(self) -> dict[str, float]:
        """The limits there are."""
        return self.model_dump(exclude_none=True)


class RecommendSpec(Spec):
    """`exitsafe recommend`."""

    run: Run
    limits: Limits = Limits()
    time: Annotated[
        bool, Flag("Load the run's model, measure its times on this machine and count what exits save.")
    ] = False
    answer_tokens: Annotated[Count, Key("Length, in tokens, of the answer whose time is compared.")] = 64
    num_samples: Annotated[Count, Key("Samples to time, one at a time, three times each.", "samples")] = 8
    device: Annotated[str | None, Flag("auto, cpu or cuda:N.", "DEVICE", default="as in the audit")] = None
    trust_remote_code: TrustRemoteCode = False
    out: Annotated[Path | None, Flag("Also write every number to this file.", "FILE.json")] = None

    @model_validator(mode="after")
    def _measures_what_it_needs(self) -> Self:
        measuring = {
            "answer_tokens": "answer_tokens",
            "num_samples": "samples",
            "device": "--device",
            "trust_remote_code": "--trust-remote-code",
        }
        for name, spelled in measuring.items():
            if not self.time and name in self.model_fields_set:
                raise InputError(f"{spelled} is for measuring; add --time or drop it")
        return self


class TranslateSpec(Spec):
    """`exitsafe translate`."""

    model: Model
    out: Annotated[Path, Flag("A folder for the maps: new, empty, or of the same maps.", "DIR", panel=OUTPUT)]
    images: Annotated[Path | None, Flag("Learn from the pictures in this folder.", "DIR", panel=SAMPLES)] = None
    suites: Annotated[
        tuple[str, ...],
        Flag(
            "Learn from the pictures of a suite's samples that are not harmful; repeatable.",
            "NAME|PATH",
            name="suite",
            panel=SAMPLES,
            default="an organism's own, training split",
        ),
    ] = ()
    exit_layers: Layers = "all"
    num_images: Annotated[Count | None, Key("Use this many of the pictures, drawn at random.")] = None
    seed: Seed = 0
    loading: Loading = Loading()

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.images is not None and self.suites:
            raise InputError("--images and --suite are two sources of pictures: give one")
        return self


class ExportSpec(Spec):
    """`exitsafe export`."""

    model: Model
    exit_layer: Annotated[int, Flag("Encoder blocks to keep; the rest are removed.")]
    out: Annotated[Path, Flag("The checkpoint's folder: new or empty.", "DIR", panel=OUTPUT)]
    keep_adapter: Annotated[
        bool, Flag("Save the adapter beside the smaller model instead of merging it.", panel=MODEL)
    ] = False
    skip_global: SkipGlobal = False
    audit: Annotated[
        Path | None,
        Flag(
            "A finished run of exactly this model and adapter; its numbers at this exit go into the model card.", "RUN"
        ),
    ] = None
    to: Annotated[
        Literal["gguf"] | None, Flag("Also write mmproj.gguf, the encoder and projector for llama.cpp.", panel=OUTPUT)
    ] = None
    loading: AdaptedLoading = AdaptedLoading()


class DoctorSpec(Spec):
    """`exitsafe doctor`."""

    model: Model
    suites: Suites = ()
    max_new_tokens: Annotated[
        Count | None, Flag("Maximum answer length in tokens.", default="256; 24 for an organism")
    ] = None
    loading: QuantizedLoading = QuantizedLoading()


class ChatSpec(Spec):
    """`exitsafe chat`."""

    model: Model
    image: Annotated[Path | None, Flag("The picture that all prompts are about.", "FILE")] = None
    prompt: Annotated[str | None, Flag("Ask this and leave.", "TEXT", default="prompts are read line by line")] = None
    exit_layers: Annotated[
        str | None,
        Flag(
            "Exits to answer at, e.g. 9,18,23 or all; the default exit always does.",
            "LAYERS",
            name="layers",
            default="the last early and the last middle one",
        ),
    ] = None
    max_new_tokens: Annotated[Count | None, _ANSWER] = None
    temperature: Annotated[float, Field(ge=0), _TEMPERATURE] = 0.0
    seed: Seed = 0
    loading: FullLoading = FullLoading()


class ServeSpec(Spec):
    """`exitsafe serve`."""

    model: Model
    host: Annotated[str, Flag("Address to listen on.", "HOST", panel=OUTPUT)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535), Flag("Port to listen on; 0 picks a free one.", panel=OUTPUT)] = 8000
    loading: FullLoading = FullLoading()

    @model_validator(mode="after")
    def _is_asked_about_pictures(self) -> Self:
        if self.loading.encoder != "image":
            raise InputError(
                "requests contain only text and pictures, so only exits of the image encoder can be served: "
                "drop --encoder"
            )
        return self


class DemoSpec(Spec):
    """`exitsafe demo`."""

    is_configured: ClassVar[bool] = False

    out: Annotated[Path, Flag("Where everything is written.", "DIR", panel=OUTPUT)] = Path("runs/demo")
    organism: Annotated[
        Literal["organism", "organism:text"],
        Flag("organism, or organism:text, where the text alone decides.", "NAME"),
    ] = "organism"
    baselines: Annotated[bool, Flag("Also train and audit the baselines: PPO at the default exit, and SFT.")] = False
    seed: Seed = 0


class LabelSpec(Spec):
    """`exitsafe label`."""

    is_configured: ClassVar[bool] = False

    run: Run
    read: Annotated[tuple[Path, ...], Flag("Read a filled-in file; repeat the option for a second rater.", "FILE")] = ()
    rows: Annotated[Count, Flag("Answers to label.")] = 100
    out: Annotated[Path | None, Flag("Where to write the file.", "FILE.csv", default="RUN/labels.csv")] = None
    include_unsafe_text: Annotated[bool, Flag("Allow --out outside the run: the file holds requests and answers.")] = (
        False
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _reads_or_writes(self) -> Self:
        if self.read and self.model_fields_set - {"run", "read"}:
            raise InputError("--read takes no flags of writing: write a file first, read it when it is filled")
        return self


class CompareSpec(Spec):
    """`exitsafe compare`."""

    is_configured: ClassVar[bool] = False

    before: Annotated[Path, Flag("A finished run.", "BEFORE", is_argument=True)]
    after: Annotated[Path, Flag("Another finished run on the same samples.", "AFTER", is_argument=True)]
    metrics: Annotated[
        tuple[str, ...],
        Flag("Metric to print a table of. Repeatable.", "NAME", name="metric", default="those that matter"),
    ] = ()
    out: Annotated[Path | None, Flag("Also write every difference to this file.", "FILE.json")] = None
    chart: Annotated[Path | None, Flag("Draw a chart of both runs.", "FILE.svg|png")] = None


class ReportSpec(Spec):
    """`exitsafe report`."""

    is_configured: ClassVar[bool] = False

    runs: Annotated[
        tuple[Path, ...], Flag("Finished audits, the baseline first; or one training run.", "RUN...", is_argument=True)
    ]
    out: Annotated[Path, Flag("HTML file to write.", "FILE.html")]
    title: Annotated[str | None, Flag("Title of the page.", "TEXT", default="names the model")] = None
    include_unsafe_text: Annotated[
        bool, Flag("Include the models' unfiltered answers; the file is then readable by you only.")
    ] = False


class SuitesSpec(Spec):
    """`exitsafe suites`."""

    is_configured: ClassVar[bool] = False

    name: Annotated[str | None, Flag("Show one entry in full.", "[NAME]", is_argument=True)] = None
