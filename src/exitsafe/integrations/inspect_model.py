"""inspect_ai's model API on a VLM that exits early: `exitsafe/MODEL@L18` -> answers at exit layer 18.

inspect_ai's response cache identifies a model by its name alone. So the name given to it contains everything that
affects an answer: the exit layer, and a digest of weights, adapter, precision, processor and settings:
`exitsafe/MODEL@L18#3f9ab2c41d07`. Different layers of one model share its weights and batches.
"""

from __future__ import annotations

import base64
import binascii
import re
import weakref
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from urllib.parse import unquote_to_bytes
from uuid import uuid4

import anyio
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from rich.markup import escape

from exitsafe.engine.load import load_vlm
from exitsafe.errors import ExitsafeError, InputError
from exitsafe.integrations.chat import Part, Turn, digest_of
from exitsafe.integrations.chat_answers import model_digest
from exitsafe.integrations.shared_worker import Question, Reply, SharedWorker
from exitsafe.store.fingerprint import canonical_json
from exitsafe.untrusted import JsonObject

DEFAULT_TOKENS = 256
LOADING_ARGS = ("adapter", "translators", "revision", "dtype", "device", "quantization", "trust_remote_code")
_SUPPORTED = {"max_tokens", "temperature", "seed", "stop_seqs", "system_message"}
_OF_THE_TOOL = {  # handled by inspect_ai itself, before or around a call
    "max_retries",
    "timeout",
    "attempt_timeout",
    "stream_idle_timeout",
    "max_connections",
    "adaptive_connections",
    "cache",
    "cache_prompt",
    "fail_on_refusal",
    "max_tool_output",
    "reasoning_history",
}
_NEUTRAL: dict[str, float] = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "num_choices": 1,
    "best_of": 1,
    "logprobs": False,
    "batch": False,
}
_workers: weakref.WeakValueDictionary[str, SharedWorker] = weakref.WeakValueDictionary()
_loading = Lock()


class ExitsafeAPI(ModelAPI):
    """A model at one exit layer.

    Args:
        model_name: `MODEL@L18`; without `@L`, the default exit. `#digest` at the end, as in logs, requires the model to
            be in the state with which the log was made.
        base_url, api_key: Not used for local models.
        config: Settings of the evaluation; unsupported ones are refused.
        model_args: `adapter`, `translators`, `revision`, `dtype`, `device`, `quantization`, `trust_remote_code` as for
            `load_vlm`; `batch_size` (rows at a time; by default as many as fit) and `skip_global` (Llama 3.2 Vision).

    Raises:
        PrerequisiteError: If an exit, argument, setting or model does not exist.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,  # of several types; `_shared_worker` checks the names
    ) -> None:
        settings = config or GenerateConfig()
        try:
            self.worker, self.exit_layer, name = _open(model_name, base_url, settings, model_args)
        except ExitsafeError as error:
            raise PrerequisiteError(escape(str(error))) from error  # inspect_ai shows the line, without a traceback
        super().__init__(name, None, api_key, [], settings)

    def max_tokens(self) -> int:
        return min(DEFAULT_TOKENS, self.worker.vlm.context_length // 2)

    def max_connections(self) -> int:
        return 2 * (self.worker.batch_size or 32)  # the next batch is collected while one runs

    def connection_key(self) -> str:
        return str(id(self.worker))

    async def count_text_tokens(self, text: str) -> int:
        return len(self.worker.vlm.tokenizer(text, add_special_tokens=False).input_ids)

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - inspect_ai's name for it
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        if tools:
            raise InputError("exitsafe models do not call tools; choose a task or solver without tools")
        check_config(config)
        turns = tuple(_turn(message) for message in input)
        is_fresh = bool(config.temperature) and config.seed is None  # each call draws anew, as epochs expect
        question = Question(
            prompt_id=f"prompt {uuid4().hex if is_fresh else digest_of(turns)[:16]}",
            turns=turns,
            exit_layer=self.exit_layer,
            max_new_tokens=config.max_tokens or self.max_tokens(),
            temperature=config.temperature or 0.0,
            seed=config.seed or 0,
            stop=tuple(config.stop_seqs or ()),
        )
        reply = await _wait(self.worker.ask(question))
        return _output(reply, self.model_name)


def check_config(config: GenerateConfig) -> None:
    """Raise InputError for a setting that would have no effect here."""
    for name, value in config.model_dump(exclude_none=True).items():
        if name not in _SUPPORTED | _OF_THE_TOOL and value != _NEUTRAL.get(name):
            supported = "max_tokens, temperature, seed, stop_seqs and system_message"
            raise InputError(f"exitsafe models do not support {name}: leave it out; they support {supported}")


def _open(
    model_name: str, base_url: str | None, config: GenerateConfig, model_args: JsonObject
) -> tuple[SharedWorker, int, str]:
    """The worker with the model, the exit layer, and the name that identifies both for inspect_ai."""
    if base_url is not None:
        raise InputError(f"exitsafe/{model_name} runs locally, not behind {base_url}; leave the base URL out")
    check_config(config)
    model, exit_layer, digest = _parse(model_name)
    worker = _shared_worker(model, model_args)
    exit_layer = worker.vlm.default_exit if exit_layer is None else exit_layer
    worker.check(exit_layer)
    now = model_digest(worker.vlm, batch_size=worker.batch_size, skip_global=worker.skip_global)
    if digest not in (None, now):
        raise InputError(
            f"exitsafe/{model_name}: the model, its adapter, settings or libraries have changed, and its digest is now "
            f"#{now}; leave #{digest} out to evaluate it as it is"
        )
    return worker, exit_layer, f"{model}@L{exit_layer}#{now}"


def _parse(name: str) -> tuple[str, int | None, str | None]:
    found = re.fullmatch(r"(.+?)(?:@L(\d+))?(?:#([0-9a-f]{12}))?", name)
    assert found is not None
    model, exit_layer, digest = found.groups()
    if "@" in model.rsplit("/")[-1] and not Path(model).is_dir():
        raise InputError(f"exitsafe/{name} is not MODEL@L followed by a number; write e.g. exitsafe/MODEL@L18")
    return model, None if exit_layer is None else int(exit_layer), digest


def _shared_worker(model: str, model_args: JsonObject) -> SharedWorker:
    """The worker for this model with these arguments, loaded only once."""
    unknown = sorted(model_args.keys() - {*LOADING_ARGS, "batch_size", "skip_global"})
    if unknown:
        raise InputError(
            f"exitsafe/{model} has no argument {unknown[0]!r}; choose from {', '.join(LOADING_ARGS)}, batch_size, "
            "skip_global"
        )
    batch_size, skip_global = model_args.get("batch_size"), bool(model_args.get("skip_global", False))
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size={batch_size}: choose 1 or more, or leave it out")
    loading = {name: model_args[name] for name in LOADING_ARGS if model_args.get(name) is not None}
    key = canonical_json([model, {name: str(value) for name, value in loading.items()}, batch_size, skip_global])
    with _loading:
        worker = _workers.get(key)
        if worker is None:
            worker = SharedWorker(load_vlm(model, **loading), batch_size=batch_size, skip_global=skip_global)
            _workers[key] = worker
    return worker


def _turn(message: ChatMessage) -> Turn:
    if message.role == "tool":
        raise InputError("the conversation contains a tool message, but exitsafe models do not call tools; remove it")
    content = message.content
    parts = (content,) if isinstance(content, str) else tuple(_part(part) for part in content)
    return Turn(role=message.role, parts=parts)


def _part(part: Content) -> Part:
    if isinstance(part, ContentText):
        return str(part.text)
    if isinstance(part, ContentImage):
        return _image_bytes(part.image)
    raise InputError(f"the conversation contains {part.type}; exitsafe models read text and images only")


def _image_bytes(reference: str) -> bytes:
    """The bytes of an image file, from a data URL or a path."""
    if reference.startswith("data:"):
        head, _, content = reference.partition(",")
        try:
            return base64.b64decode(content, validate=True) if head.endswith(";base64") else unquote_to_bytes(content)
        except binascii.Error as error:
            raise InputError("an image's data URL is not valid base64; encode the picture file again") from error
    if "://" in reference:
        raise InputError("an image is given by a URL, but nothing is downloaded; give a file or a data URL")
    try:
        return Path(reference).read_bytes()
    except OSError as error:
        raise InputError(f"image {reference[:200]} cannot be read ({error.strerror}); check the path") from error


async def _wait(future: Future[Reply]) -> Reply:
    """Wait on any event loop without blocking it."""
    try:
        while not future.done():
            await anyio.sleep(0.02)
    finally:
        future.cancel()  # no effect if it is done
    return future.result()


def _output(reply: Reply, model_name: str) -> ModelOutput:
    answer = reply.answer
    num_tokens = 0 if answer is None else answer.num_tokens
    message = ChatMessageAssistant(content="" if answer is None else answer.text, model=model_name, source="generate")
    stop_reason: Literal["model_length", "stop", "max_tokens"]
    if reply.is_full:
        stop_reason = "model_length"
    else:
        stop_reason = "stop" if answer is None or answer.finish_reason == "stop" else "max_tokens"
    return ModelOutput(
        model=model_name,
        choices=[ChatCompletionChoice(message=message, stop_reason=stop_reason)],
        usage=ModelUsage(
            input_tokens=reply.num_prompt_tokens,
            output_tokens=num_tokens,
            total_tokens=reply.num_prompt_tokens + num_tokens,
        ),
    )
