"""`exitsafe audit`: flags -> what to audit and how -> a run directory and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.audit_plan import make_plan, run_plan, show_results
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError


def audit_command(
    model: options.Model,
    out: options.Out,
    suite: options.Suites = None,
    images: options.Images = None,
    category: options.Category = None,
    layers: options.Layers = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Judge that scores the answers; repeatable, and the first judge that measures a metric reports it. "
            "One of world-rule, refusal-prefix, qwen3guard, llama-guard, harmbench, toxicity, reward:MODEL and "
            "rubric:MODEL; NAME:MODEL takes another model.",
            show_default="world-rule for organism suites, else qwen3guard",
            rich_help_panel=options.JUDGES,
        ),
    ] = None,
    judge_pass: Annotated[
        str | None,
        typer.Option(metavar="beside|second", help="Judge while answering, or in a second pass.", hidden=True),
    ] = None,
    judge_device: options.JudgeDevice = None,
    judge_url: options.JudgeUrl = None,
    judge_rubric: options.JudgeRubric = None,
    judge_rate: options.JudgeRate = None,
    judge_prices: options.JudgePrices = None,
    adapter: options.Adapter = None,
    translators: options.Translators = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Take suites, layers, judges, decoding and seed from another run; flags win.",
            show_default=False,
            rich_help_panel=options.SAMPLES,
        ),
    ] = None,
    limit: options.Limit = None,
    split: options.Split = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest answer in tokens.",
            show_default="256 or what the context leaves; an organism 24",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="T",
            help="Sampling temperature; 0 is greedy.",
            show_default="0",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Answers generated at a time; does not change what is drawn.",
            show_default="what fits in memory",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    stop_when: Annotated[
        str | None,
        typer.Option(metavar="decided", help="Stop at a layer once its ASR is clearly above or below.", hidden=True),
    ] = None,
    max_asr: Annotated[float | None, typer.Option(metavar="RATE", help="The limit of stop_when.", hidden=True)] = None,
    error: Annotated[
        float | None, typer.Option(metavar="RATE", help="Chance of a wrong decision per layer.", hidden=True)
    ] = None,
    skip_global: Annotated[
        bool | None, typer.Option("--skip-global", help="Llama 3.2 Vision: skip the global blocks too.", hidden=True)
    ] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Measure a model's safety and utility at every exit layer of its image encoder.

    Answers are saved as they come; rerun the same command to resume. `accelerate launch -m exitsafe audit ...` shares
    the work among GPUs and nodes.
    """
    with console.results(as_json=json) as show:
        given = {
            "suites": suite or None,
            "split": split,
            "seed": seed,
            "limit": limit,
            "images": images,
            "categories": category or None,
            "exit_layers": layers,
            "judges": judge or None,
            "judging": options.judging(
                device=judge_device, url=judge_url, rubric=judge_rubric, rate=judge_rate, prices=judge_prices
            )
            or None,
            "judge_pass": _one_of("--judge-pass", judge_pass, ("beside", "second")),
            "stop_when": _stop_rule(stop_when, max_asr, error),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "skip_global": skip_global,
            "batch_size": batch_size,
        }
        plan = make_plan(model, given, like=like)
        loading = {
            "adapter": adapter,
            "translators": translators,
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
        }
        run = run_plan(plan, out=out, loading=loading)
        show_results(run, show)


def _one_of(flag: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise InputError(f"{flag} {value} is unknown; choose {' or '.join(allowed)}")
    return value


def _stop_rule(stop_when: str | None, max_asr: float | None, error: float | None) -> dict[str, float] | None:
    """The rule's fields; its own flags make no sense without it."""
    if _one_of("--stop-when", stop_when, ("decided",)) is None:
        if max_asr is not None or error is not None:
            raise InputError("--max-asr and --error belong to --stop-when decided; add it or leave them out")
        return None
    if max_asr is None:
        raise InputError("--stop-when decided needs the limit to decide about: --max-asr RATE, e.g. 0.05")
    from exitsafe.results.stopping import StopRule

    return vars(StopRule(max_asr=max_asr, **({} if error is None else {"error": error})))
