"""The lmms-eval integration: `--model exitsafe --model_args pretrained=MODEL,exit_layer=3`.

lmms-eval's response cache keys answers by the model's arguments, so exits never mix; it ignores the contents of
folders, so a new adapter needs a new folder or a new cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL.Image import Image

from exitsafe.engine.load import load_vlm
from exitsafe.engine.prompts import Prompt
from exitsafe.errors import InputError
from exitsafe.integrations.chat import Part, Turn, encode_chat
from exitsafe.integrations.chat_answers import ChatRequest, answer_chats, log_likelihoods, model_digest
from exitsafe.machine.processes import this_process
from exitsafe.untrusted import JsonObject

DEFAULT_TOKENS = 256
_SUPPORTED = {"max_new_tokens", "max_gen_toks", "temperature", "do_sample", "until"}
_SAMPLING = {"top_p", "top_k"}  # without effect when greedy
_NEUTRAL: dict[str, float | str] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "n": 1,
    "best_of": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "image_aspect_ratio": "original",  # as the processor does it
    "top_p": 1.0,
    "top_k": 0,
}


class ExitsafeLMM(lmms):
    """A model at one exit layer, for tasks with conversations.

    Args:
        pretrained: A Hub id, a folder, `organism` or `organism:text`.
        exit_layer: Encoder blocks to run; None is the default exit.
        adapter, translators, revision, dtype, device, quantization, trust_remote_code: As for `load_vlm`.
        skip_global: As in `VLM.exit_at`.
        batch_size: Rows at a time, or "auto".
        max_batch_size: Passed by lmms-eval and ignored: memory bounds "auto".
        seed: Together with task, document and exit layer, the key of every draw.

    Raises:
        InputError, ModelError: If an exit, argument or model does not exist.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        exit_layer: int | None = None,
        *,
        adapter: str | None = None,
        translators: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        trust_remote_code: bool = False,
        skip_global: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"exitsafe has no model argument {min(unknown)!r}; docs/integrations.md lists them")
        self.batch_size = _batch_size(batch_size)
        self.vlm = load_vlm(
            pretrained,
            adapter=adapter,
            translators=translators,
            revision=revision,
            dtype=dtype,
            device=device,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
        self.exit_layer = self.vlm.default_exit if exit_layer is None else exit_layer
        self.skip_global = skip_global
        self.seed = seed
        with self.vlm.exit_at(self.exit_layer, skip_global=skip_global):
            pass  # raise now what every answer would raise
        process = this_process()  # lmms-eval distributes the documents by its index and count
        self._rank, self._world_size = process.process_index, process.num_processes

    @property
    def device(self) -> torch.device:
        return self.vlm.device

    def __repr__(self) -> str:
        """The model in the cache's key, if lmms-eval is given the model itself instead of its arguments."""
        digest = model_digest(self.vlm, batch_size=self.batch_size, skip_global=self.skip_global)
        return f"exitsafe/{self.vlm.name}@L{self.exit_layer}#{digest}"

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer conversations, in order."""
        asked = Counter[str]()
        chats = []
        for request in requests:
            name, turns, options = self._read(request.args)
            asked[name] += 1  # lmms-eval repeats a request unchanged, but each repetition needs its own draw
            prompt_id = name if asked[name] == 1 else f"{name} again {asked[name]}"
            chats.append(self._chat(encode_chat(self.vlm, turns, prompt_id=prompt_id), options))
        answers = answer_chats(self.vlm, chats, batch_size=self.batch_size, skip_global=self.skip_global)
        return [
            GenerationResult(
                text=answer.text,
                token_counts=TokenCounts(input_tokens=len(chat.prompt.input_ids), output_tokens=answer.num_tokens),
            )
            for chat, answer in zip(chats, answers, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each continuation of the model's turn, the sum of its log-probabilities and whether it is greedy.

        lmms-eval 0.7.3 does not send these requests to models that take conversations; other callers may.
        """
        pairs: list[tuple[Prompt, str]] = []
        for request in requests:
            context, target, *rest = request.args
            document: object = None
            pictures: list[object] = []
            name = "a continuation without a document"  # for acc_mutual_info: the choice by itself
            if rest:
                doc_to_visual, doc_id, task, split = rest
                name = f"{task} {split} {doc_id}"
                document = self.task_dict[task][split][doc_id]
                pictures = list(doc_to_visual(document) or [])
            turn = Turn(role="user", parts=(*(_picture(each, name) for each in pictures), context))
            continuation = target if isinstance(target, str) else str(target(document))
            pairs.append((encode_chat(self.vlm, [turn], prompt_id=name), continuation))
        return log_likelihoods(
            self.vlm, pairs, self.exit_layer, batch_size=self.batch_size or 16, skip_global=self.skip_global
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise InputError("exitsafe answers a single round; choose a task of output type generate_until")

    def _read(self, args: tuple[Any, ...]) -> tuple[str, list[Turn], JsonObject]:
        """A request's name, conversation and generation options."""
        _, doc_to_messages, options, doc_id, task, split = args
        name = f"{task} {split} {doc_id}"
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return name, [_turn(message, name) for message in messages], options

    def _chat(self, prompt: Prompt, options: JsonObject) -> ChatRequest:
        room = self.vlm.context_length - len(prompt.input_ids)
        if room < 1:
            raise InputError(
                f"{prompt.sample_id} leaves no room for an answer in the model's {self.vlm.context_length} tokens; "
                "leave it out"
            )
        temperature = _temperature(options)
        wanted = {name: value for name, value in options.items() if name not in _SUPPORTED and value is not None}
        for name, value in wanted.items():
            if value != _NEUTRAL.get(name) and not (name in _SAMPLING and temperature == 0.0):
                raise InputError(
                    f"exitsafe does not support the generation option {name}={value!r}: remove it from the task"
                )
        until = options.get("until") or ()
        return ChatRequest(
            prompt=prompt,
            exit_layer=self.exit_layer,
            max_new_tokens=min(room, options.get("max_new_tokens") or options.get("max_gen_toks") or DEFAULT_TOKENS),
            temperature=temperature,
            seed=self.seed,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        )


def _turn(message: JsonObject, name: str) -> Turn:
    content = message["content"]
    if isinstance(content, str):
        return Turn(role=message["role"], parts=(content,))
    parts: list[Part] = []
    for part in content:
        if part["type"] not in ("text", "image"):
            raise InputError(f"{name} contains {part['type']}; exitsafe reads text and images only")
        parts.append(part["text"] if part["type"] == "text" else _picture(part["url"], name))
    return Turn(role=message["role"], parts=tuple(parts))


def _picture(picture: object, name: str) -> Image | Path | bytes:
    if isinstance(picture, Image | bytes):
        return picture
    if isinstance(picture, str) and "://" not in picture:
        return Path(picture)
    raise InputError(f"{name} has a picture of type {type(picture).__name__}; give an image, its bytes or a file")


def _temperature(options: JsonObject) -> float:
    """The temperature, 0 for greedy decoding; as in transformers, sampling without a temperature is at 1."""
    if options.get("do_sample") is False:
        return 0.0
    temperature = options.get("temperature")
    return float(temperature) if temperature is not None else float(bool(options.get("do_sample")))


def _batch_size(batch_size: int | str) -> int | None:
    if batch_size == "auto":
        return None
    try:
        number = int(batch_size)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"batch_size={batch_size}: choose 1 or more, or auto")
    return number
