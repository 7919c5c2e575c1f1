"""`exitsafe align`: flags and a settings file -> an L-PPO run and its adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.models import announce, load_model
from exitsafe.cli.rewards import WatchFlags, make_watch, read_rewards
from exitsafe.cli.settings_file import FIELDS, config_option

if TYPE_CHECKING:
    from exitsafe.lppo import LPPOConfig

NO_WATCH = WatchFlags()


def lppo_fields() -> Collection[str]:
    from dataclasses import fields

    from exitsafe.lppo import LPPOConfig

    return [field.name for field in fields(LPPOConfig)]


def align_command(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    suite: options.Suites = None,
    exit_layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="LAYERS",
            help="all, or e.g. 1-8,16,23; the default exit is always trained too (include_default in --config).",
            show_default="all",
            rich_help_panel=options.SAMPLES,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JUDGE[@KIND][=WEIGHT]",
            help="Judge that scores the answers, or built-in; built-in also scores what the judge does not measure. "
            "Repeatable, with weights and for kinds of samples, e.g. reward:hh@harmful=0.5: the score is the weighted "
            "sum.",
            show_default="built-in: qwen3guard; for an organism, its world's rule",
            rich_help_panel=options.JUDGES,
        ),
    ] = None,
    watch_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Evaluate on held-out samples with another judge every N steps and keep the best adapter. 0: never.",
            show_default="never",
            rich_help_panel=options.JUDGES,
        ),
    ] = None,
    watch_judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Judge for held-out evaluations; must differ from the reward.",
            show_default="qwen3guard, or harmbench if the reward uses it; refusal-prefix for an organism",
            rich_help_panel=options.JUDGES,
        ),
    ] = None,
    watch_suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Samples to evaluate on, as --suite; else held out from the training.",
            hidden=True,
        ),
    ] = None,
    watch_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Hold out this many samples of each kind, at most a quarter; or use the first N of each "
            "--watch-suite.",
            hidden=True,
        ),
    ] = None,
    watch_patience: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Stop after N evaluations without improvement; 0 never stops.", hidden=True
        ),
    ] = None,
    watch_max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Weights with a higher KL per response do not become the adapter.",
            hidden=True,
        ),
    ] = None,
    images: options.Images = None,
    category: options.Category = None,
    limit: options.Limit = None,
    num_steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="PPO steps.", show_default="400; an organism 80")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="lora|full", help="What of the language model.", show_default="lora; an organism full"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Of the policy.", show_default="1.4e-5; an organism 1.5e-4"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Answers per step.", show_default="64; an organism 128"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest answer.",
            show_default="256; an organism 24",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    save_completions: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Keep N answers with their scores at every checkpoint, in a file of DIR that only you can read; "
            "exitsafe report DIR shows them.",
            hidden=True,
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also log each step's numbers to tensorboard (in DIR), trackio or wandb; may come several times.",
            hidden=True,
        ),
    ] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option(section="lppo", fields=lppo_fields)] = None,
    json: options.Json = False,
) -> None:
    """Align a model at many exit layers by layer-wise PPO; the result is a PEFT adapter, DIR/adapter.

    Organisms are trained on the training split of their suites, other models on --suite.

    All fields of LPPOConfig can be set in --config. Rerun the same command to resume an interrupted training.
    """
    with console.results(as_json=json) as show:
        chosen = {
            "exit_layers": exit_layers,
            "num_steps": num_steps,
            "train": train,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "save_completions": save_completions,
            "seed": seed,
        }
        changes = context.meta.get(FIELDS, {}) | {name: value for name, value in chosen.items() if value is not None}
        loading = {
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
        }
        is_finished = (out / "adapter").is_dir()
        adapter = run_align(
            model,
            suites=suite,
            images=images,
            categories=category,
            limit=limit,
            rewards=reward,
            watch=WatchFlags(
                every=watch_every,
                judge=watch_judge,
                suites=watch_suite,
                samples=watch_samples,
                patience=watch_patience,
                max_kl=watch_max_kl,
            ),
            changes=changes,
            track=track or (),
            out=out,
            loading=loading,
            title="L-PPO",
        )
        audit = f"exitsafe audit {model} --adapter {adapter} --like BEFORE --out AFTER"
        found = describe(adapter) | {"was_finished": is_finished}
        if is_finished:
            console.note(f"{out} was finished already: nothing was done")
        show(found, lambda: [f"Adapter: {adapter}", *_words(found["result"]), f"Audit it as before: {audit}"])


def run_align(
    model: str,
    *,
    suites: list[str] | None = None,
    images: Path | None = None,
    categories: list[str] | None = None,
    limit: int | None = None,
    rewards: list[str] | None = None,
    watch: WatchFlags = NO_WATCH,
    changes: dict[str, Any],
    track: Sequence[str] = (),
    out: Path,
    loading: dict[str, Any],
    title: str,
) -> Path:
    """Read samples and settings, which is quick and can fail, then load the model and train it."""
    names = defaults.choose_suites(model, suites, otherwise="--suite NAME_OR_FILE")
    reward = read_rewards(rewards)
    config = make_config(model, changes)
    origin = defaults.make_origin(
        model, suites=names, split="train", seed=config.seed, limit=limit, images=images, categories=categories
    )
    samples = defaults.read_samples(origin)
    samples, watching = make_watch(model, samples, watch, reward=reward, seed=config.seed, images=images)
    announce(model)
    from exitsafe.judges.registry import DEFAULT_JUDGE, SECOND_JUDGE
    from exitsafe.lppo import align
    from exitsafe.lppo.scorer import as_scorer

    scorer = as_scorer(reward, samples)  # a judge that is not available says so before the model is loaded
    vlm = load_model(model, **loading)
    with console.progress_bar(title, unit="step") as progress:
        adapter = align(
            vlm, samples, reward=reward, config=config, evaluation=watching, track=track, out=out, progress=progress
        )
    if any(judge.name == DEFAULT_JUDGE for judge in scorer.judges):
        console.note(
            f"{DEFAULT_JUDGE} was the reward, and audits use it too: also judge both audits with another model, e.g. "
            f"exitsafe judge RUN --judge {SECOND_JUDGE}"
        )
    return adapter


def make_config(model: str, changes: dict[str, Any]) -> LPPOConfig:
    """The model's usual settings with the changes; a small batch or a short run takes along what hangs on its size."""
    from exitsafe.lppo import LPPOConfig

    make = LPPOConfig if defaults.organism_of(model) is None else LPPOConfig.for_organism
    usual = make()
    fitting = {}
    if isinstance(batch_size := changes.get("batch_size"), int):
        fitting["minibatch_size"] = min(usual.minibatch_size, batch_size)
    if isinstance(num_steps := changes.get("num_steps"), int):
        fitting["value_warmup_steps"] = min(usual.value_warmup_steps, num_steps - 1)
    layers = changes.get("exit_layers", "all")
    # a YAML list may hold ranges
    layers = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    return make(**fitting | changes | {"exit_layers": layers})


def describe(adapter: Path) -> dict[str, Any]:
    """The finished run in numbers: its settings, what became the adapter, and the metrics of its last step."""
    from exitsafe.lppo.folder import TrainingFolder, read_lines, read_record

    folder = adapter.parent
    lines = read_lines(folder / "metrics.jsonl")
    return {
        "run": str(folder),
        "adapter": str(adapter),
        "settings": read_record(folder / "run.json")["settings"],
        "result": TrainingFolder(folder).result,
        "last_step": lines[-1] if lines else None,
    }


def _words(result: dict[str, Any] | None) -> list[str]:
    """What happened in training and which step was chosen."""
    if result is None:
        return []
    lines = [] if result["learnt"] else [f"Nothing was learnt: {result['why_not']}."]
    if "objective" in result:
        early = ", ended early" if result["stopped_early"] else ""
        lines.append(f"The adapter is from step {result['adapter_step']} of {result['steps']}{early}: {result['why']}.")
    lines.append(
        f"Skipped minibatches: {result['skipped_minibatches']} of {result['minibatches']}. Unscored answers: "
        f"{result['unscored_answers']} of {result['answers']}. Steps without a difference between scores: "
        f"{result['constant_steps']} of {result['steps']}."
    )
    return lines
