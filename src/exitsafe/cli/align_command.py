"""`exitsafe align`: flags and a settings file -> a training run and its adapter."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from exitsafe.cli import console
from exitsafe.cli.models import announce, load_model
from exitsafe.cli.rewards import hold_out, read_rewards
from exitsafe.lppo.config import AlignSpec, LPPOConfig
from exitsafe.untrusted import JsonObject

_TITLES = {"lppo": "L-PPO", "grpo": "L-GRPO", "sft": "Fine-tuning"}


def align_command(spec: AlignSpec, show: console.Show) -> None:
    """Align a model at many exit layers, by layer-wise PPO unless --method says otherwise.

    The result is a PEFT adapter, DIR/adapter.

    Organisms are trained on the training split of their suites, other models on --suite.

    All fields of LPPOConfig can be set in --config. Rerun the same command to resume an interrupted training.
    """
    is_finished = (spec.out / "adapter").is_dir()
    adapter = run_align(spec, title=_TITLES[spec.lppo.method])
    found = describe(adapter) | {"was_finished": is_finished}
    audit = f"exitsafe audit {spec.model} --adapter {adapter} --like BEFORE --out AFTER"
    show(found, lambda: [f"Adapter: {adapter}", *_words(found["result"]), f"Audit it as before: {audit}"])


def run_align(spec: AlignSpec, *, title: str) -> Path:
    """Read samples and rewards, which is quick and can fail, then load the model and train it."""
    from exitsafe.data.source import find_samples

    seed = spec.lppo.seed
    samples = find_samples(spec.model, spec.samples, split="train", seed=seed)
    reward = read_rewards(spec.rewards)
    training, evaluation = hold_out(spec, samples.read(), reward=reward)
    announce(spec.model, adapter=spec.loading.adapter)
    from exitsafe.lppo import align
    from exitsafe.lppo.scorer import as_scorer

    # a judge that is not available says so before the model is loaded
    as_scorer(reward, training, method=spec.lppo.method)
    vlm = load_model(spec.model, spec.loading)
    with console.progress_bar(title, unit="step") as bar:
        plan = cache(
            lambda: console.note(_plan(spec.lppo, spec.loading.adapter))
        )  # printed once, when everything has been checked

        def progress(done: int, total: int, remark: str) -> None:
            plan()
            bar(done, total, remark)

        return align(
            vlm,
            training,
            reward=reward,
            config=spec.lppo,
            evaluation=evaluation,
            track=spec.track,
            out=spec.out,
            progress=progress,
        )


def _plan(config: LPPOConfig, adapter: str | None) -> str:
    """What the training will use."""
    fresh = f"LoRA of rank {config.lora_rank}" if config.train == "lora" else "all weights of the language model"
    trained = fresh if adapter is None else adapter
    recomputed = ", activations recomputed" if config.recomputes else ""
    return (
        f"training {trained}: {config.num_steps} steps of {config.batch_size} answers, {config.microbatch_tokens:,} "
        f"tokens per pass (halved when memory runs out){recomputed}"
    )


def describe(adapter: Path) -> JsonObject:
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


def _words(result: JsonObject | None) -> list[str]:
    """What happened in training and which step was chosen."""
    if result is None:
        return []
    lines = [] if result["learnt"] else [f"Nothing was learnt: {result['why_not']}."]
    if "objective" in result:
        early = ", ended early" if result["stopped_early"] else ""
        lines.append(f"The adapter is from step {result['adapter_step']} of {result['steps']}{early}: {result['why']}.")
    counts = f"Skipped minibatches: {result['skipped_minibatches']} of {result['minibatches']}."
    if result["answers"]:
        counts += (
            f" Unscored answers: {result['unscored_answers']} of {result['answers']}. Steps without a difference "
            f"between scores: {result['constant_steps']} of {result['steps']}."
        )
    return [*lines, counts]
