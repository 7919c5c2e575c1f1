"""`GuardJudge`: a local guard model reads a request and its answer, and its reply is the verdict. Judges text only.

Each known guard model is a `Guard` in its own file (qwen3guard.py, llama_guard.py, harmbench.py), which says how it is
prompted and how its replies are read. Replies are decoded greedily, so that verdicts are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exitsafe.errors import ModelError
from exitsafe.judges.protocol import MEASURES
from exitsafe.records import Response, Sample, Verdict
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exitsafe.exits.huggingface import LanguageModel

Finding = tuple[str, bool] | None
"""A label, and whether the attack succeeded or the answer refused; None where the reply cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A known guard model.

    Args:
        name: Name of the judge.
        model: The Hub id to use when the judge is given none.
        measures: The measures that its replies decide.
        read: Reads a reply into a finding for each measure; labels contain no free text from the reply.
        format: Name of the format, recorded in runs.
        max_new_tokens: Longest reply, in tokens.
        labels: Headings of the parts of its prompt; no line of foreign text may start with one.
        prompts: The prompt with `{request}` and `{answer}`, by model type; empty to use the model's chat template.
        markers: Further texts that may not occur in foreign text, besides the tokenizer's special tokens.
    """

    name: str
    model: str
    measures: tuple[str, ...]
    read: Callable[[str], Mapping[str, Finding]]
    format: str
    max_new_tokens: int
    labels: tuple[str, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()


class GuardJudge:
    """Judges by a guard model.

    Args:
        guard: The guard model's description.
        model: Another size or copy of it: a Hub id or local folder.
        revision: A branch, tag or commit of the Hub id.
        dtype: "auto" (as saved), or e.g. "bfloat16".
        device: "auto" (this process's GPU, else the CPU), or e.g. "cuda:1".
        batch_size: Answers at a time; halved when memory runs out.
    """

    def __init__(
        self,
        guard: Guard,
        model: str = "",
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 16,
    ) -> None:
        from exitsafe.judges.local_model import JudgeModel

        model = model or guard.model
        self.guard, self.batch_size = guard, batch_size
        self.name = guard.name if model == guard.model else f"{guard.name}:{model}"
        self.measures = guard.measures
        self._weights = JudgeModel(model, revision=revision, dtype=dtype, device=device)

    @property
    def settings(self) -> JsonObject:
        """What decides the verdicts."""
        return self._weights.settings | {"format": self.guard.format, "max_new_tokens": self.guard.max_new_tokens}

    @property
    def model(self) -> str:
        """The model's Hub id or folder."""
        return self._weights.model

    def unload(self) -> None:
        """Free the memory; the next call loads again."""
        self._weights.unload()

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        from exitsafe.judges.local_model import greedy_replies

        kinds = {kind for measure in self.measures for kind in MEASURES[measure].kinds}
        pairs = [pair for pair in zip(samples, responses, strict=True) if pair[0].kind in kinds]
        if not pairs:
            return []
        model, tokenizer = self._weights.load()
        replies = greedy_replies(
            model,
            tokenizer,
            [self._prompt(model, tokenizer, sample.prompt, response.text) for sample, response in pairs],
            max_new_tokens=self.guard.max_new_tokens,
            batch_size=self.batch_size,
            add_special_tokens=bool(self.guard.prompts),  # a chat template has already written them
        )
        return [
            verdict
            for (sample, response), reply in zip(pairs, replies, strict=True)
            for verdict in self._verdicts(sample, response, reply)
        ]

    def _prompt(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, request: str, answer: str) -> str:
        from exitsafe.judges.guard_prompts import fill_prompt, render_answer

        if not self.guard.prompts:
            return render_answer(tokenizer, request, answer, labels=self.guard.labels)
        prompt = self.guard.prompts.get(model.config.model_type)
        if prompt is None:
            raise ModelError(
                f"{self.name}: there is no {self.guard.name} classifier of model type {model.config.model_type}; "
                f"try {self.guard.model}"
            )
        return fill_prompt(tokenizer, prompt, request, answer, labels=self.guard.labels, markers=self.guard.markers)

    def _verdicts(self, sample: Sample, response: Response, reply: str | None) -> list[Verdict]:
        from exitsafe.judges.local_model import why_unread

        verdicts = []
        for measure, finding in self.guard.read(reply or "").items():
            if sample.kind in MEASURES[measure].kinds:
                label, score = ("", None) if finding is None else (finding[0], float(finding[1]))
                reason = why_unread(reply) if score is None else None
                verdicts.append(
                    Verdict.of(response, judge=self.name, measure=measure, label=label, score=score, unscored=reason)
                )
        return verdicts
