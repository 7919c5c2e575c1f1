"""`exitsafe doctor`: a model's config -> what is supported, what it will hold in memory, what its exits save."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.align_command import make_config
from exitsafe.cli.doctor_tables import facts_table, memory_table, readable
from exitsafe.cli.models import read_blueprint, torch_device
from exitsafe.cli.rewards import read_rewards
from exitsafe.cli.settings_file import FIELDS, config_option

if TYPE_CHECKING:
    import torch

    from exitsafe.doctor import Blueprint, Plan, Savings, Typical
    from exitsafe.judges import Judge
    from exitsafe.lppo import LPPOConfig, WeightedSum
    from exitsafe.records import Sample

ASSUMED_SAMPLES = 1000
_HARDLY = 0.1  # below this share of an answer an exit is no way to speed


def _lppo_fields() -> Collection[str]:
    from dataclasses import fields

    from exitsafe.lppo import LPPOConfig

    return [field.name for field in fields(LPPOConfig)]


def doctor_command(
    context: typer.Context,
    model: options.Model,
    suite: options.Suites = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            metavar="N",
            help="Samples to train on; with --suite they are counted.",
            show_default=f"{ASSUMED_SAMPLES}, assumed",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Answers under way at a time in an audit.", show_default="what fits in memory"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer of an audit.", show_default="256; an organism 24"),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JUDGE[@KIND][=WEIGHT]", help="As for align: its model is counted.", show_default="built-in"
        ),
    ] = None,
    watch_judge: Annotated[
        str | None,
        typer.Option(metavar="JUDGE", help="As for align: its model is counted.", show_default="no watch"),
    ] = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option(section="lppo", fields=_lppo_fields)] = None,
    json: options.Json = False,
) -> None:
    """Say whether a model is supported and what it will need, before any weight is read or downloaded.

    Also runs the processor check that starts every audit, without weights.

    The memory plan of align is that of LPPOConfig's defaults, or of the fields in --config.
    """
    with console.results(as_json=json) as show:
        lppo = make_config(model, context.meta.get(FIELDS, {}))
        blueprint = read_blueprint(
            model, dtype=dtype, quantization=quantization, revision=revision, trust_remote_code=trust_remote_code
        )
        if (problem := blueprint.processor_problem) is not None and not _is_out_of_reach(blueprint):
            raise problem  # as the audit would
        samples = _samples(model, suite)
        document, plans = examine(
            blueprint,
            model,
            lppo,
            samples=samples,
            num_samples=len(samples) or num_samples or ASSUMED_SAMPLES,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=torch_device(device),
            reward=read_rewards(reward),
            watch_judge=watch_judge,
        )
        show(document, lambda: [facts_table(document), *(memory_table(*plan) for plan in plans), *document["notes"]])


def examine(
    blueprint: Blueprint,
    model: str,
    lppo: LPPOConfig,
    *,
    samples: Sequence[Sample],
    num_samples: int,
    batch_size: int | None,
    max_new_tokens: int | None,
    device: torch.device,
    reward: Judge | WeightedSum | None = None,
    watch_judge: str | None = None,
) -> tuple[dict[str, Any], list[tuple[str, Plan]]]:
    """All findings as one JSON object, and the plans by their titles."""
    from exitsafe.doctor import align_plan, audit_plan, bytes_by_name, count_savings, judge_bytes, typical_prompt
    from exitsafe.judges import load_judges
    from exitsafe.judges.qwen3guard import DEFAULT_MODEL
    from exitsafe.judges.registry import DEFAULT_JUDGE, why_no_default_judge
    from exitsafe.lppo.sampler import trained_exits
    from exitsafe.lppo.scorer import need_helper, parts_of
    from exitsafe.vlm.memory import free_memory

    typical = typical_prompt(blueprint, samples)
    compute = _shares(blueprint, count_savings(blueprint, typical, [1]))
    free = free_memory(device)
    is_organism = defaults.organism_of(model) is not None
    longest = max_new_tokens or (defaults.ORGANISM_TOKENS if is_organism else defaults.MODEL_TOKENS)
    judge = None if is_organism else f"qwen3guard:{DEFAULT_MODEL}"
    is_host = device.type == "cpu"
    auditing = audit_plan(
        blueprint,
        typical,
        exit_layers=blueprint.exit_layers,
        max_new_tokens=longest,
        batch_size=batch_size,
        judge_bytes=0 if judge is None else bytes_by_name(DEFAULT_MODEL),  # its config may be out of reach
        free=free,
        is_host=is_host,
    )
    given = [cast("Judge", part.reward) for part in parts_of(reward) if part.reward is not None]
    has_guard = not is_organism and need_helper(parts_of(reward))  # its config may be out of reach, as above
    rewarding = {judge.name: judge for judge in given if not (has_guard and judge.name == DEFAULT_JUDGE)}
    exits = trained_exits(lppo, num_layers=blueprint.num_layers, default_exit=blueprint.default_exit)
    watching = None if watch_judge is None else judge_bytes(load_judges([watch_judge]), on=device)
    training = align_plan(
        blueprint,
        typical,
        exit_layers=exits,
        num_samples=num_samples,
        config=lppo,
        reward_bytes=judge_bytes(list(rewarding.values()), on=device) + has_guard * bytes_by_name(DEFAULT_MODEL),
        watch_bytes=watching,
        free=free,
        is_host=is_host,
    )
    document = {
        "model": model,
        "supported": True,
        "family": blueprint.family,
        "encoder": blueprint.family_row.vision,
        "num_layers": blueprint.num_layers,
        "default_exit": blueprint.default_exit,
        "dtype": str(blueprint.base_model.dtype).removeprefix("torch."),
        "quantization": blueprint.quantization,
        "processor": blueprint.processor is not None,
        "chat_template": getattr(blueprint.processor, "chat_template", None) is not None,
        "prompt_tokens": {"longest": typical.num_prompt_tokens, "measured": typical.is_measured},
        "feature_bytes_per_exit": typical.feature_bytes,
        "samples": {"number": num_samples, "measured": bool(samples)},
        "judge": judge,
        "judge_problem": None if judge is None else why_no_default_judge(),
        "device": {"name": str(device), "free_bytes": free},
        "compute": compute,
        "audit": _plan(auditing),
        "align": _plan(training),
    }
    plans = [("audit", auditing), ("align", training)]
    notes = [*_about_judge(document), *_notes(blueprint, typical, compute, plans, lppo)]
    return document | {"notes": notes}, plans


def _about_judge(document: dict[str, Any]) -> list[str]:
    """Which judge an audit will use if the default judge is not available."""
    if document["judge_problem"] is None:
        return []
    return [
        f"The default judge, {document['judge']}, is not available ({document['judge_problem']}).",
        "Without --judge an audit would use refusal-prefix, a proxy that counts requests not refused and does not read "
        "the answers.",
    ]


def _notes(
    blueprint: Blueprint, typical: Typical, compute: dict[str, float], plans: list[tuple[str, Plan]], lppo: LPPOConfig
) -> list[str]:
    """What the numbers mean, one line each."""
    import torch

    share, most = compute["encoder_share"], compute["saved_at_most"]
    verdict = "hardly makes it faster: audit its exits for safety" if most < _HARDLY else "makes it faster"
    notes = [
        f"Early exit {verdict}. The encoder is {share:.1%} of the work before the first token, each block "
        f"{compute['saved_per_block']:.2%}; exit 1 saves {most:.1%} of an answer of 64 tokens."
    ]
    for name, plan in plans:
        if plan.fits is False:
            notes.append(
                f"{name} does not fit comfortably: about {readable(plan.peak)} of {readable(plan.free or 0)} free."
            )
    training = dict(plans)["align"]
    if training.fits is False and not lppo.gradient_checkpointing:
        notes.append("Less for align: gradient_checkpointing: true, a smaller microbatch_tokens, --quantization nf4.")
    if training.rows_that_fit is not None and training.rows > training.rows_that_fit > 0:
        notes.append(f"Set rollout_batch_size to {training.rows_that_fit} or less: more rows do not fit.")
    if blueprint.base_model.dtype == torch.float16:
        notes.append("align refuses float16, in which small gradients vanish: give --dtype bfloat16.")
    if blueprint.processor is None:
        reason = blueprint.processor_problem or "There is no processor: save it beside the model before audit or align"
        notes.append(f"{reason}. Only the config was read: prompts and image placeholders are not checked.")
    else:
        notes += [f"{remark}." for remark in blueprint.remarks]
        notes.append("Processor, tokens and image placeholders passed the checks of an audit; weights were not read.")
    if blueprint.processor is not None and getattr(blueprint.processor, "chat_template", None) is None:
        notes.append("The processor has no chat template: prompts are written in the family's plain format.")
    if not typical.is_measured:
        notes.append("Prompts are assumed to be one picture and 64 tokens of text; --suite looks at yours.")
    return notes


def _is_out_of_reach(blueprint: Blueprint) -> bool:
    """Whether the processor is on the Hub and was not read, so it could not be checked."""
    problem = blueprint.processor_problem
    is_local = defaults.organism_of(blueprint.name) is not None or Path(blueprint.name).is_dir()
    return problem is not None and not is_local and isinstance(problem.__cause__, OSError)


def _samples(model: str, suites: list[str] | None) -> list[Sample]:
    """Training samples, where they are named or an organism's own."""
    if not suites and defaults.organism_of(model) is None:
        return []
    names = defaults.choose_suites(model, suites, otherwise="--suite")
    return defaults.read_samples(defaults.make_origin(model, suites=names, split="train", seed=0, limit=None))


def _shares(blueprint: Blueprint, savings: Savings) -> dict[str, float]:
    blocks = max(1, blueprint.default_exit - 1)
    return {
        "encoder": savings.default_encoder,
        "encoder_at_first_exit": savings.encoder[1],
        "prefill": savings.prefill,
        "answer": savings.answer,
        "default_exit": blueprint.default_exit,
        "encoder_share": savings.encoder_share,
        "saved_per_block": savings.saved(1) / blocks / (savings.default_encoder + savings.prefill),
        "saved_at_most": savings.saved_share(1),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(plan) | {"peak": plan.peak, "fits": plan.fits}
