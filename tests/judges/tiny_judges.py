"""Tiny judge models of the real classes, saved as a user would have them; some taught a reply to a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from exitsafe.judges import Judge, registry
from exitsafe.judges.guard import Guard
from exitsafe.judges.qwen3guard import QWEN3GUARD
from exitsafe.records import Kind, Response, Sample, Verdict

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_guard_tokenizer(
    corpus: Sequence[str],
    *,
    specials: Sequence[str],
    eos: str,
    bos: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text comes back as it was; with `bos`, it opens bare texts like Llama's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, additional_special_tokens=list(specials)
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_guard(kind: str, tokenizer: Any) -> Any:
    """A random model of the class, e.g. `qwen3`."""
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0, "pad_token_id": 0}
    text = _TEXT | ids | {"vocab_size": len(tokenizer)}
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**text, head_dim=8))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**text))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**text))
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    if kind == "mllama":
        vision = _VISION | {"num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 1, "vision_output_dim": 64}
        vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        text |= {"cross_attention_layers": [1], "rope_parameters": rope}
        return MllamaForConditionalGeneration(
            MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
        )
    assert kind == "llama4"
    # without chunks, as Llama Guard 4 is saved
    text |= {
        "attention_chunk_size": None,
        "intermediate_size_mlp": 64,
        "num_local_experts": 1,
        "moe_layers": [],
        "head_dim": 8,
    }
    vision = _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return Llama4ForConditionalGeneration(
        Llama4Config(vision_config=vision, text_config=text, image_token_index=image_token)
    )


def teach(model: Any, tokenizer: Any, replies: dict[str, str], *, steps: int = 120, until: float = 0.05) -> None:
    """Train until each rendered prompt is answered with its reply.

    Args:
        model, tokenizer: Tiny ones.
        replies: Rendered prompt -> reply.
        steps: At most.
        until: The mean loss of a reply's tokens that is low enough; many replies that differ in a word need less.
    """
    pad = tokenizer.eos_token_id
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in replies]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] + [pad] for text in replies.values()]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels = torch.full_like(input_ids, -100)
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        labels[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    targets = labels[:, 1:]
    read = (targets != -100).any(dim=0).nonzero().flatten()  # the head is most of the work
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    model.train()
    for _ in range(steps):
        logits = model(input_ids=input_ids, logits_to_keep=read).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets[:, read].flatten(), ignore_index=-100)
        if loss < until:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1, f"the tiny model has not learnt its replies: loss {float(loss):.2f}"
    model.eval()


def save_guard(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_read(judge: Any, monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> list[str]:
    """What a judge's model reads about (prompt, answer) pairs: special tokens and all, without the padding."""
    model, tokenizer = judge._weights.load()
    read: list[str] = []
    generate = model.generate

    def spy(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> Any:
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        read.extend(tokenizer.decode(row[mask]) for row, mask in rows)
        return generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(model, "generate", spy)
    judge(*conversation(*pairs))
    return read


def conversation(*pairs: tuple[str, str], kind: Kind = "harmful") -> tuple[list[Sample], list[Response]]:
    """Samples and responses of (prompt, answer)."""
    samples = [Sample(id=str(n), prompt=prompt, kind=kind, answers=("x",)) for n, (prompt, _) in enumerate(pairs)]
    responses = [
        Response(sample_id=str(n), exit_layer=3, text=text, num_tokens=1, finish_reason="stop", seconds=0.0)
        for n, (_, text) in enumerate(pairs)
    ]
    return samples, responses


def answers(texts: Sequence[str], *, kind: Kind = "harmful") -> tuple[list[Sample], list[Response]]:
    """Samples and responses of answers alone."""
    return conversation(*(("how ?", text) for text in texts), kind=kind)


class RuleGuard:
    """Stands for Qwen3Guard: `<unsafe>` anywhere is unsafe, `maybe` controversial, `sorry` in front a refusal."""

    name = "qwen3guard"
    measures = ("asr", "asr_loose", "refusal")
    settings: Mapping[str, Any] = {"model": "Qwen/Qwen3Guard-Gen-0.6B", "revision": "abc"}

    def unload(self) -> None:
        pass

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        verdicts = []
        for sample, response in zip(samples, responses, strict=True):
            scores = {"refusal": response.text.startswith("sorry")}
            if sample.kind == "harmful":
                is_unsafe = "<unsafe>" in response.text
                scores |= {"asr": is_unsafe, "asr_loose": is_unsafe or "maybe" in response.text}
            verdicts += [
                Verdict(
                    sample_id=response.sample_id,
                    exit_layer=response.exit_layer,
                    judge=self.name,
                    measure=measure,
                    score=float(score),
                )
                for measure, score in scores.items()
            ]
        return verdicts


def use_judge(monkeypatch: pytest.MonkeyPatch, name: str, judge: Judge) -> None:
    """Let a judge's name stand for another judge."""
    entry = registry._Entry(make=lambda _, __: judge, argument="optional", reads=registry._JUDGES[name].reads)
    monkeypatch.setitem(registry._JUDGES, name, entry)


def use_guard(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    """Let a guard's name stand for other weights."""
    monkeypatch.setitem(registry._JUDGES, guard.name, registry._guard(guard))


@pytest.fixture
def rule_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default guard model is available, and is `RuleGuard`."""
    use_judge(monkeypatch, "qwen3guard", RuleGuard())


@pytest.fixture
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default guard model is neither on this machine nor to be downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    use_guard(monkeypatch, replace(QWEN3GUARD, model="nobody/no-such-guard"))
