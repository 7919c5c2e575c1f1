"""(j) Which exit a served model runs: how often `exitsafe verify URL` errs, on the pair that is hardest to tell apart.

Each repetition quantises the organism's language model anew, by stochastic rounding, has pictures of its own, and
serves exit 7 or 8; the reference has the original weights. Questions go straight to the model instead of over HTTP.
Goal: the exit that runs is excluded in at most 1% of the repetitions.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from exitsafe import load_vlm
from exitsafe.engine.endpoint import Endpoint
from exitsafe.engine.served_model import ServedModel
from exitsafe.engine.vlm import VLM
from exitsafe.exporting.candidates import Candidate, Reference
from exitsafe.exporting.questions import Questions
from exitsafe.exporting.served import LOWEST_LOGPROB, TOP_LOGPROBS, Answer, Interview, Tokens
from exitsafe.exporting.which_exit import ERROR, MAX_NEW_TOKENS, MAX_REQUESTS, identify
from exitsafe.records import Sample

REPETITIONS = 200
HARDEST = (Candidate(7), Candidate(8))
BLOCK = 32


def main() -> None:
    vlm = load_vlm("organism")
    print(f"(j) {REPETITIONS} repetitions: the organism at exit 7 or 8, each language model quantised anew")
    for has_logprobs in (True, False):
        for bits in (8, 4):
            print(f"    {study(vlm, REPETITIONS, bits=bits, has_logprobs=has_logprobs)}", flush=True)


def study(vlm: VLM, repetitions: int, *, bits: int, has_logprobs: bool) -> str:
    """The outcomes of repetitions, in a line."""
    found = [repetition(vlm, seed, bits=bits, has_logprobs=has_logprobs) for seed in range(repetitions)]
    outcomes, requests = Counter(outcome for outcome, _ in found), sorted(number for _, number in found)
    how = "log-probabilities" if has_logprobs else "answers alone"
    right, unclear, wrong = (outcomes[outcome] for outcome in ("right", "open", "wrong"))
    return (
        f"{bits} bits, {how}: right {right}, not told apart {unclear}, wrong {wrong}; questions: median "
        f"{median(requests):g}, most {requests[-1]}"
    )


def repetition(vlm: VLM, seed: int, *, bits: int, has_logprobs: bool) -> tuple[str, int]:
    """ "right", "wrong" or "open", and the requests that it took."""
    runs = HARDEST[seed % len(HARDEST)]
    interview = _Direct(quantised(vlm, bits=bits, seed=seed), runs, has_logprobs=has_logprobs)
    found = identify(
        vlm,
        interview,
        _OtherQuestions(vlm, seed),
        claimed=None,
        error=ERROR,
        max_requests=MAX_REQUESTS,
        progress=lambda done, total, note: None,
    )
    possible = {(each.exit_layer, each.fault) for each in found.candidates}
    if (runs.exit_layer, runs.fault) not in possible:
        return "wrong", found.decided_after
    return ("right" if found.verdict == "established" else "open"), found.decided_after


def quantised(vlm: VLM, *, bits: int, seed: int) -> VLM:
    """The model with the matrices of its language model rounded as by llama.cpp's q8_0 and q4_0, stochastically."""
    copied = VLM(copy.deepcopy(vlm.base_model), vlm.processor, name=f"{bits} bits", encoder=vlm.encoder)
    generator = torch.Generator().manual_seed(seed)
    matrices: list[Any] = [each for each in copied.base_model.get_decoder().modules() if hasattr(each, "weight")]
    for module in [*matrices, copied.base_model.get_output_embeddings()]:
        if module.weight.dim() == 2 and module.weight.shape[1] % 16 == 0:
            module.weight.data = _rounded(module.weight.data, bits, generator)
    return copied


def _rounded(weight: torch.Tensor, bits: int, generator: torch.Generator) -> torch.Tensor:
    blocks = weight.reshape(weight.shape[0], -1, BLOCK if weight.shape[1] % BLOCK == 0 else BLOCK // 2)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest.abs() / 127 if bits == 8 else largest / -8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    levels = (blocks / scale + torch.rand(blocks.shape, generator=generator)).floor()
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    return (levels.clamp(low, high) * scale).reshape(weight.shape)


class _OtherQuestions(Questions):
    def __init__(self, vlm: VLM, seed: int) -> None:
        super().__init__(vlm)
        self.first = 1000 * seed

    def picture_question(self, number: int) -> Sample:
        return super().picture_question(self.first + number)


class _Direct(Interview):
    """An interview of a model in this process."""

    def __init__(self, vlm: VLM, runs: Candidate, *, has_logprobs: bool) -> None:
        nowhere = ServedModel(endpoint=Endpoint("m", base_url="http://127.0.0.1:9/v1"), name="m")
        super().__init__(model=nowhere, vlm=vlm, max_tokens=MAX_NEW_TOKENS)
        self.reference, self.runs, self.has_logprobs = Reference(vlm, max_new_tokens=MAX_NEW_TOKENS), runs, has_logprobs

    def remarks(self, samples: Sequence[Sample]) -> list[str]:
        return []

    def ask(self, samples: Sequence[Sample]) -> list[Answer]:
        self.num_requests += len(samples)
        return [self._answer(sample) for sample in samples]

    def _answer(self, sample: Sample) -> Answer:
        (row,) = self.reference.rows(sample, [self.runs])
        done = self.vlm.complete([row], max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, seed=0, batch_size=1)
        (tokens,) = (completion.token_ids for _, completion in done)
        text = " ".join(self.vlm.decode(tokens).split())
        if not self.has_logprobs:
            return Answer(text=text)
        response = self.reference.readable(tokens)
        (logprobs,) = self.reference.logprobs([row], [response])
        best = logprobs.topk(TOP_LOGPROBS, dim=-1)
        top: list[dict[Tokens, float]] = [
            {(token,): max(LOWEST_LOGPROB, value) for token, value in zip(ids, values, strict=True)}
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return Answer(text=text, token_ids=tuple(response[:-1].tolist()), top=tuple(top))


if __name__ == "__main__":
    main()
