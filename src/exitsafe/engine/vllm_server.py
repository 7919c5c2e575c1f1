"""A running vLLM server that answers from our features: `vllm serve MODEL --enable-mm-embeds`.

The features of an exit are sent there as image embeddings, with all exits mixed; batching and parallelism are left to
the server. Before the first answer, its model is checked to be the one loaded here: its log-probabilities at two exits
must be those that our own language model, read from disk, computes. Every answer is checked too: the prompt that the
server read is compared with ours, token by token, and the answer's token ids are decoded here.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exitsafe.engine.completion import ChatReply
from exitsafe.engine.endpoint import ChatRequest
from exitsafe.engine.generation import Completion, seed_of
from exitsafe.engine.prompts import Row
from exitsafe.engine.reader import probe_sample
from exitsafe.engine.served_model import BYTES_IN_FLIGHT, LazyRequests, find_served
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.exits.encoder import embeddings_in
from exitsafe.exits.features import tensors_in
from exitsafe.machine.processes import this_process
from exitsafe.records import Sample
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

SAME = 0.2
"""Largest mean difference of log-probabilities between the server's model and ours. For the organism, another number
type moves them by 0.02, another organism by 0.4, a missing adapter by 1 (docs/engines.md)."""
_QUESTION, _LENGTH, _TOP = "what is in this picture?", 4, 5
_NOT_TAKEN = ("cohere2_vision", "gemma3", "gemma3n", "gemma4", "internvl", "llava_next", "llava_onevision")
"""Families whose image embeddings stop vLLM 0.32: it asserts that there are none or, for InternVL, LLaVA-NeXT and
LLaVA-OneVision, that all pictures in a batch have as many tokens."""


class VLLMServer:
    """A vLLM server as the engine of an audit.

    Args:
        url: Its address, e.g. "http://localhost:8000", with "#NAME" for one of its models, such as a LoRA adapter.

    Attributes:
        settings: What a run records: the server, its version and the model's name there, never its address.

    Raises:
        InputError: If the URL is not that of a vLLM server that serves this model.
        RunError: If the server cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.served = find_served(url, what="--engine")
        self.endpoint = self.served.endpoint
        if self.served.owner != "vllm" or self.served.version is None:
            raise InputError(
                f"{self.endpoint.where} is not a vLLM server, and only vLLM accepts image embeddings: give the URL of "
                "vllm serve MODEL --enable-mm-embeds"
            )
        self.settings: JsonObject = {"name": "vllm", "version": self.served.version, "model": self.served.name}

    def check(self, vlm: VLM, samples: Sequence[Sample], *, num_tokens: int) -> None:
        """Check that the server can answer these samples, and answers as the model does.

        Args:
            vlm: The model, whose language model may be on disk.
            samples: Everything that will be asked.
            num_tokens: The longest prompt and answer together.

        Raises:
            InputError: If the server's context is too short, or samples have media that cannot be sent.
            ModelError: If the server's model is another, or does not take this model's image embeddings.
            RunError: If the server does not answer.
        """
        if vlm.encoder.modality != "image" or any(sample.videos or sample.audios for sample in samples):
            raise InputError("an engine can answer only about pictures; leave --engine out for videos and audio")
        if vlm.image_cache_layers or vlm.family in _NOT_TAKEN:
            raise ModelError(f"vLLM does not accept image embeddings for {vlm.family} models; leave --engine out")
        length = self.served.context_length
        if length is not None and num_tokens > length:
            raise InputError(
                f"the context of {self.endpoint.where} is {length} tokens, but these prompts and answers take up to "
                f"{num_tokens}: start it with --max-model-len {num_tokens} or more"
            )
        self._check_prompts(vlm, samples)
        if this_process().is_main_process:  # one reads the language model from disk; the others wait
            self._check_model(vlm)

    def complete(
        self,
        vlm: VLM,
        rows: Sequence[Row],
        samples: Mapping[str, Sample],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        most_at_once: int,
    ) -> Iterator[tuple[int, Completion]]:
        """Answer rows as `VLM.complete` does; the random draws are the server's.

        Args:
            samples: The rows' samples by id.
            most_at_once: Requests in flight, if they have no more than `BYTES_IN_FLIGHT`.

        Raises:
            RunError: If the server fails, or answers something that is not an answer to our prompt. Completions that
                have arrived by then are yielded first.
        """
        requests = LazyRequests(
            len(rows),
            lambda index: _request(
                vlm, rows[index], samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            ),
        )
        largest = max((_num_bytes(row) for row in rows), default=1)
        self.endpoint.concurrency = max(1, min(most_at_once, BYTES_IN_FLIGHT // largest))
        failure, since = "", time.perf_counter()
        for index, reply in self.endpoint.complete(requests):
            fault = self._fault(vlm, rows[index], reply, max_new_tokens=max_new_tokens)
            failure = failure or fault
            if not fault:
                tokens = reply.token_ids or ()
                now, before = time.perf_counter(), since
                since = now
                has_stopped = tokens[-1] in vlm.eos_token_ids
                yield (
                    index,
                    Completion(
                        token_ids=tokens, finish_reason="stop" if has_stopped else "length", seconds=now - before
                    ),
                )
        if failure:
            raise RunError(
                f"{self.endpoint.where} {failure}; answers so far are saved: rerun the same command to resume"
            )

    def _fault(self, vlm: VLM, row: Row, reply: ChatReply, *, max_new_tokens: int) -> str:
        """What is wrong with a reply, as the end of a sentence; empty for an answer."""
        sample = f"sample {row.prompt.sample_id} at exit {row.exit_layer}"
        if reply.failure is not None:
            return f"did not answer {sample}: {reply.failure}"
        tokens = reply.token_ids
        if tokens is None or reply.prompt_token_ids is None:
            return "does not return token ids: use vLLM 0.32 or newer"
        if difference := _difference(row.prompt.input_ids.tolist(), reply.prompt_token_ids):
            return (
                f"reads a different prompt for {sample}: {difference}; serve the same model, with its own chat template"
            )
        num_embeddings = vlm.base_model.get_input_embeddings().weight.shape[0]
        if not 0 < len(tokens) <= max_new_tokens or max(tokens) >= num_embeddings:
            return f"answers {sample} with {len(tokens)} tokens that this model cannot have generated"
        if not set(tokens[:-1]).isdisjoint(vlm.eos_token_ids):
            return f"continues its answer to {sample} after its end: it must stop at stop_token_ids"
        if tokens[-1] not in vlm.eos_token_ids and len(tokens) < max_new_tokens:
            return (
                f"ends its answer to {sample} after {len(tokens)} of {max_new_tokens} tokens: it must not set a limit"
            )
        return ""

    def _check_prompts(self, vlm: VLM, samples: Sequence[Sample]) -> None:
        """Let the server write one prompt of each shape, and compare; all others are compared as they are answered."""
        shapes = {(bool(sample.system), len(sample.images)): sample for sample in reversed(samples)}
        rows = [_row(vlm, sample, vlm.default_exit) for sample in shapes.values()]
        by_id = {sample.id: sample for sample in shapes.values()}
        for (_, num_images), row in zip(shapes, rows, strict=True):
            for _, reply in self.endpoint.complete([_request(vlm, row, by_id)]):
                if reply.failure is not None and num_images:
                    raise ModelError(
                        f"{self.endpoint.where} does not answer from image embeddings of this {vlm.family} model "
                        f"({reply.failure}): start it with vllm serve MODEL --enable-mm-embeds; if it was, this "
                        "version of vLLM does not accept them for this model"
                    )
                if fault := self._fault(vlm, row, reply, max_new_tokens=1):
                    raise ModelError(f"{self.endpoint.where} {fault}")

    @torch.no_grad()
    def _check_model(self, vlm: VLM) -> None:
        """Compare the server's log-probabilities, along its own answer, with those of our own weights."""
        sample, exits = probe_sample(text=_QUESTION), ((vlm.default_exit + 1) // 2, vlm.default_exit)
        rows = [_row(vlm, sample, exit_layer) for exit_layer in exits]
        requests = [_request(vlm, row, {sample.id: sample}, max_new_tokens=_LENGTH, top=_TOP) for row in rows]
        replies = dict(self.endpoint.complete(requests))
        for index, row in enumerate(rows):
            if fault := self._fault(vlm, row, replies[index], max_new_tokens=_LENGTH):
                raise ModelError(f"{self.endpoint.where} {fault}")
        answers = [torch.tensor(replies[index].token_ids) for index in range(len(rows))]
        theirs = [_logprobs(replies[index]) for index in range(len(rows))]
        if any(len(found) != len(answer) or not all(found) for found, answer in zip(theirs, answers, strict=True)):
            raise ModelError(
                f"{self.endpoint.where} gives no log-probabilities, without which its model cannot be checked"
            )
        differences = _differences(vlm, rows, answers, theirs)
        for exit_layer, difference in zip(exits, differences, strict=True):
            if not difference <= SAME:
                raise ModelError(
                    f"{self.endpoint.where} serves a different model from {vlm.name}"
                    f"{'' if vlm.adapter is None else ' with this adapter'}: at exit {exit_layer} log-probabilities "
                    f"differ by {difference:.2g} (at most {SAME:g} is allowed); serve the same weights in the same "
                    "precision, and name a served adapter as URL#NAME"
                )
        if vlm.adapter is None:
            return
        with vlm.model.disable_adapter():  # which may change less than another precision does
            without = _differences(vlm, rows, answers, theirs)
        if sum(without) < sum(differences) / 2:
            raise ModelError(
                f"{self.endpoint.where} serves {vlm.name} without this adapter: log-probabilities differ by "
                f"{sum(without) / len(rows):.2g} from those without it, and by {sum(differences) / len(rows):.2g} from "
                "those with it; name a served adapter as URL#NAME"
            )


def _differences(
    vlm: VLM, rows: Sequence[Row], answers: Sequence[Tensor], theirs: Sequence[Sequence[Mapping[int, float]]]
) -> list[float]:
    """Mean differences between the server's log-probabilities along its answers and ours, by row."""
    hidden, _, mask = vlm.response_states(rows, answers)
    ours = vlm.logits(hidden).log_softmax(dim=-1)
    means = []
    for index, found in enumerate(theirs):
        here = ours[index, mask[index]].cpu()
        each = [
            abs(here[place, token].item() - value) if token < here.shape[1] else float("inf")
            for place, top in enumerate(found)
            for token, value in top.items()
        ]
        means.append(sum(each) / len(each))
    return means


_AS_HERE: dict[str, object] = {
    # a checkpoint's generation settings, which a server applies unless they are given
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # its own ends, so that only ours count
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""Fields of vLLM's API with which it answers as our own loop does."""


def _request(
    vlm: VLM,
    row: Row,
    samples: Mapping[str, Sample],
    *,
    max_new_tokens: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    top: int | None = None,
) -> ChatRequest:
    """The request for a row: its pictures' features, then its text."""
    sample = samples[row.prompt.sample_id]
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    parts = [*_image_parts(vlm, row, sample), {"type": "text", "text": sample.prompt}]
    return ChatRequest(
        messages=[*system, {"role": "user", "content": parts}],
        max_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed_of(sample.id, row.exit_layer, seed=seed, draw=row.draw) if temperature else 0,
        top_logprobs=top,
        extra=_AS_HERE | {"stop_token_ids": list(vlm.eos_token_ids)},
    )


def _row(vlm: VLM, sample: Sample, exit_layer: int) -> Row:
    prompt = vlm.encode_prompt(sample)
    features = vlm.prompt_features([prompt], [exit_layer])[0][exit_layer]
    return Row(prompt=prompt, exit_layer=exit_layer, features=features)


def _image_parts(vlm: VLM, row: Row, sample: Sample) -> list[dict[str, Any]]:
    """A content part for each picture: its tokens (T, H), and what else vLLM places them by."""
    if row.features is None:
        return []
    output = row.features["image"]
    whole = embeddings_in(output)
    pictures = list(whole) if isinstance(whole, list | tuple) else [whole]
    count = len(sample.images)
    if len(pictures) != count:
        if count > 1:
            raise InputError(
                f"sample {sample.id}: this model joins the features of several pictures, which cannot be sent one by "
                "one; leave out the sample or --engine"
            )
        pictures = [torch.cat([each.flatten(0, -2) for each in pictures])]
    pictures = [each.flatten(0, -2) for each in pictures]
    if (levels := output.get("deepstack_features")) is not None:
        pictures = _with_deepstack(vlm, pictures, levels)
    grids = row.prompt.media.get("image_grid_thw")
    if grids is None:
        return [{"type": "image_embeds", "image_embeds": _encoded(each)} for each in pictures]
    return [
        {"type": "image_embeds", "image_embeds": {"image_embeds": _encoded(each), "image_grid_thw": _encoded(grid)}}
        for each, grid in zip(pictures, grids, strict=True)
    ]


def _with_deepstack(vlm: VLM, pictures: Sequence[Tensor], levels: Sequence[Any]) -> list[Tensor]:
    """Each picture's tokens beside their deepstack features, (T, (1 + levels) * H): zeros, which add nothing, at the
    levels that an exit does not reach."""
    depth = len(vlm.base_model.config.vision_config.deepstack_visual_indexes)
    tokens = torch.cat(list(pictures))
    reached = [torch.cat(list(each)) if isinstance(each, list | tuple) else each for each in levels]
    missing = [torch.zeros_like(tokens)] * (depth - len(reached))
    whole = torch.cat([tokens, *reached, *missing], dim=-1)
    return list(whole.split([len(each) for each in pictures]))


def _encoded(tensor: Tensor) -> str:
    content = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), content)  # a view would be saved with all of its storage
    return base64.b64encode(content.getvalue()).decode()


def _num_bytes(row: Row) -> int:
    """About as many as its request has."""
    return 2**16 + sum(tensor.nbytes for tensor in tensors_in(row.features or ())) * 4 // 3


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two prompts differ; nothing of what is in them."""
    if list(ours) == list(theirs):
        return ""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{len(theirs)} tokens instead of {len(ours)}, different from token {place + 1} on"


def _logprobs(reply: ChatReply) -> list[dict[int, float]]:
    """The most likely tokens, by id, in each place of an answer; none where they cannot be read."""
    found = []
    for place in reply.logprobs or ():
        named = {text.removeprefix("token_id:"): value for text, _, value in place.top}
        found.append({int(token): value for token, value in named.items() if token.isdecimal() and len(token) < 10})
    return found
