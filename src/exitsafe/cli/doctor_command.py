"""`exitsafe doctor`: a model's config -> whether it is supported, what it needs in memory, what its exits save."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.cli.console import readable
from exitsafe.cli.models import read_blueprint
from exitsafe.specs.inputs import Samples
from exitsafe.specs.verbs import DoctorSpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.doctor import Blueprint, Plan, Typical
    from exitsafe.records import Sample
    from exitsafe.results.costs import Savings

_HARDLY = 0.1  # below this share of an answer an exit is no way to speed


def doctor_command(spec: DoctorSpec, show: console.Show) -> None:
    """Say whether a model is supported, what it needs in memory and what early exit saves.

    Reads the config and the processor, which go through the checks that start every audit. No weights are read or
    downloaded.
    """
    blueprint = read_blueprint(spec.model, spec.loading)
    document = examine(blueprint, spec)
    show(document, lambda: [_facts_table(document), _memory_table(document), *document["notes"]])


def examine(blueprint: Blueprint, spec: DoctorSpec) -> JsonObject:
    """All findings as one JSON object."""
    from exitsafe.doctor import bytes_by_name, count_savings, make_plan, typical_prompt
    from exitsafe.engine.read_ahead import DEFAULT_NEW_TOKENS
    from exitsafe.judges.qwen3guard import QWEN3GUARD
    from exitsafe.judges.registry import why_no_default_judge
    from exitsafe.machine.devices import find_device
    from exitsafe.machine.memory import free_memory
    from exitsafe.world.profile import profile_of

    profile, device = profile_of(spec.model), find_device(spec.loading.device)
    typical = typical_prompt(blueprint, _samples(spec) if spec.suites or profile else [])
    compute = _shares(blueprint, count_savings(blueprint, typical, [1]))
    judge = None if profile else f"qwen3guard:{QWEN3GUARD.model}"
    plan = make_plan(
        blueprint,
        typical,
        max_new_tokens=spec.max_new_tokens or (profile.max_new_tokens if profile else DEFAULT_NEW_TOKENS),
        judge_bytes=0 if judge is None else bytes_by_name(QWEN3GUARD.model),  # its config may be out of reach
        free_bytes=free_memory(device),
    )
    judge_problem = None if judge is None else why_no_default_judge()
    return {
        "model": spec.model,
        "supported": True,
        "family": blueprint.family,
        "encoder": f"{blueprint.encoder.kind}, blocks {blueprint.encoder.path}",
        "num_layers": blueprint.num_layers,
        "default_exit": blueprint.default_exit,
        "dtype": str(blueprint.base_model.dtype).removeprefix("torch."),
        "quantization": blueprint.quantization,
        "chat_template": getattr(blueprint.processor, "chat_template", None) is not None,
        "prompt_tokens": {"longest": typical.num_prompt_tokens, "measured": typical.is_measured},
        "feature_bytes_per_exit": typical.feature_bytes,
        "judge": judge,
        "judge_problem": judge_problem,
        "device": str(device),
        "compute": compute,
        "memory": asdict(plan),
        "notes": [*_about_judge(judge, judge_problem), *_notes(blueprint, typical, compute, plan)],
    }


def _about_judge(judge: str | None, problem: str | None) -> list[str]:
    """Which judge an audit will use if the default judge is not available."""
    if problem is None:
        return []
    return [
        f"The default judge, {judge}, is not available ({problem}).",
        "Without --judge an audit would use refusal-prefix, a proxy that counts requests not refused and does not read "
        "the answers.",
    ]


def _notes(blueprint: Blueprint, typical: Typical, compute: dict[str, float], plan: Plan) -> list[str]:
    """What the numbers mean, one line each."""
    import torch

    share, most = compute["encoder_share"], compute["saved_at_most"]
    verdict = "hardly makes it faster: audit its exits for safety" if most < _HARDLY else "makes it faster"
    notes = [
        f"Early exit {verdict}. The encoder is {share:.1%} of the work before the first token, each block "
        f"{compute['saved_per_block']:.2%}; exit 1 saves {most:.1%} of an answer of 64 tokens."
    ]
    if plan.rows == 0:
        notes.append(
            f"The weights, {readable(plan.loaded_bytes)} with the judge's, do not fit in the "
            f"{readable(plan.free_bytes)} that are free: use a smaller --dtype or "
            "--quantization nf4, or audit with --config judge_pass=second."
        )
    if blueprint.base_model.dtype == torch.float16:
        notes.append("align refuses float16, in which small gradients vanish: use --dtype bfloat16.")
    notes += [f"{remark}." for remark in blueprint.remarks]
    notes.append(
        "Encoder, exits, processor, tokens and placeholders passed the checks with random weights; the real weights, "
        "and generation, are checked when the model is first loaded."
    )
    if blueprint.processor.chat_template is None:
        notes.append("The processor has no chat template: prompts are written as pictures, then text.")
    if not typical.is_measured:
        hears = blueprint.encoder.modality == "audio"
        medium = "one second of audio" if hears else "one picture of 448 by 448 pixels"
        notes.append(f"Prompts are assumed to be {medium} and 64 words; --suite measures yours.")
    return notes


def _samples(spec: DoctorSpec) -> list[Sample]:
    """The named suites' samples, or an organism's own."""
    from exitsafe.data.source import find_samples

    return find_samples(spec.model, Samples(suites=spec.suites), split="train", seed=0).read()


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


def _facts_table(document: JsonObject) -> Any:
    """What the model is."""
    tokens, judge = document["prompt_tokens"], document["judge"]
    available = "available" if document["judge_problem"] is None else "NOT AVAILABLE"
    return _table(
        f"{document['model']}: supported",
        {
            "family": f"{document['family']}, encoder {document['encoder']}",
            "exits": f"1 to {document['num_layers']}; the untouched model reads {document['default_exit']}",
            "weights": ", ".join(filter(None, [document["dtype"], document["quantization"]])),
            "chat template": "found" if document["chat_template"] else "missing",
            "longest prompt": f"{tokens['longest']} tokens" + ("" if tokens["measured"] else ", assumed"),
            "features": f"{readable(document['feature_bytes_per_exit'])} per prompt and exit",
            "default judge": "world-rule, the organism's own" if judge is None else f"{judge}, {available}",
        },
    )


def _memory_table(document: JsonObject) -> Any:
    """What is known of its memory."""
    memory = document["memory"]
    weights = memory["weights"]
    lines = {
        "image encoder": readable(weights["encoder"]),
        "language model": readable(weights["language_model"]),
        "projector and head": readable(weights["rest"]),
        "judge beside it": readable(memory["judge_bytes"]),
        "cache": f"{readable(memory['cache_bytes_per_row'])} per row of {memory['num_tokens']} tokens",
        "free": f"{readable(memory['free_bytes'])} on {document['device']}",
        "an audit begins with": f"{memory['rows']} rows at a time",
    }
    return _table("Memory", lines)


def _table(title: str, lines: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines.items():
        table.add_row(label, text)
    return table
