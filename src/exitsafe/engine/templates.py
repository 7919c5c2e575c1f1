"""Chat templates: messages in, the text that the model reads out.

A template is a program from a checkpoint and may be hostile. It is rendered in a separate process, which is killed when
it takes too long and in which the date is the one that the caller chooses.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from exitsafe.errors import ModelError
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exitsafe.exits.huggingface import MultimodalProcessor

    Templated: TypeAlias = PreTrainedTokenizerBase | MultimodalProcessor

SECONDS = 10.0
"""Longest time for one conversation; a typical template takes less than a millisecond."""
_PROGRAM = Path(__file__).with_name("template_process.py")
FIXED_DATE = "2024-07-26"
"""The date for judges' templates, so that a verdict does not depend on the day; Llama 3's default without a clock."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_HINT = "use a checkpoint that you trust, or replace its chat_template.jinja"


class TemplateRefusedError(ModelError):
    """The template cannot render these messages; it may accept others."""


def render(
    processor: Templated, messages: Sequence[Mapping[str, object]], *, today: str, add_generation_prompt: bool = True
) -> str:
    """A conversation rendered by a chat template, as by transformers' `apply_chat_template`.

    Args:
        processor: A processor or tokenizer that has a chat template.
        messages: The turns, as JSON.
        today: The date given to the template, e.g. "2026-01-31".
        add_generation_prompt: Whether to open the model's turn.

    Raises:
        TemplateRefusedError: If the template raises an error on these messages, or adds text that cannot be encoded.
        ModelError: If it takes too much time or memory, or attempts something that the sandbox forbids.
    """
    request = {
        "template": _template(processor),
        "variables": dict(getattr(processor, "tokenizer", processor).special_tokens_map),  # type: ignore[union-attr]
        "messages": list(messages),
        "today": today,
        "add_generation_prompt": add_generation_prompt,
    }
    reply = _RENDERER.ask(request)
    if "error" in reply:
        raise _error(reply["error"], " ".join(reply["message"].split()))
    text = str(reply["text"])
    surrogates = set(_SURROGATE.findall(text))
    if surrogates and surrogates - set(json.dumps(request["messages"], ensure_ascii=False)):
        raise TemplateRefusedError("the chat template writes a lone surrogate, which is not a valid character")
    return text


def check_template(processor: Templated | None, *, today: str) -> bool:
    """Render short conversations, with a picture and without, so that a harmful template is found at once.

    Returns:
        Whether the output depends on the date.

    Raises:
        ModelError: As `render`, or if the template accepts none of them.
    """
    if processor is None or processor.chat_template is None:
        return False
    is_dated, refusals = False, []
    for messages in _PROBES:
        try:
            text = render(processor, messages, today=today)
            if not text.strip():
                raise TemplateRefusedError("the chat template writes nothing")
            is_dated |= any(render(processor, messages, today=date) != text for date in _OTHER_DATES)
        except TemplateRefusedError as refusal:  # many templates accept only one of the two
            refusals.append(refusal)
    if len(refusals) == len(_PROBES):
        raise ModelError(f"{refusals[0]}; {_HINT}")
    return is_dated


def tokens_after_turn(processor: MultimodalProcessor | None, *, today: str) -> list[int]:
    """The text that a chat template writes after an answer, as token ids; empty if it does not render answers.

    Raises:
        ModelError: As `render`.
    """
    if processor is None or processor.chat_template is None:
        return []
    said = "answer"
    for user, assistant in (([_TEXT], [{"type": "text", "text": said}]), ("hello", said)):
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        try:
            text = render(processor, messages, today=today, add_generation_prompt=False)
        except TemplateRefusedError:
            continue
        _, found, after = text.rpartition(said)
        if found:
            return list(processor.tokenizer.encode(after, add_special_tokens=False))
    return []


def prepare() -> None:
    """Start the rendering process, so that it is ready when the weights are loaded."""
    _RENDERER.start()


_TEXT = {"type": "text", "text": "hello"}
_PROBES: tuple[list[dict[str, object]], ...] = (
    [{"role": "user", "content": [{"type": "image"}, _TEXT]}],
    [{"role": "user", "content": [_TEXT]}],
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}],
)
_OTHER_DATES = ("1999-12-31", "2001-02-03")


class _Renderer:
    """The rendering process, started at first use and restarted after it dies. Safe for threads and forks."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._asked = 0

    def start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            try:
                self._owner = os.getpid()
                self._process = subprocess.Popen(  # noqa: S603 - our own file
                    [sys.executable, "-P", str(_PROGRAM)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    encoding="utf-8",
                )
                self._send(self._process, sys.path)
            except BaseException:
                self.stop()
                raise
        return self._process

    def ask(self, request: Mapping[str, object]) -> JsonObject:
        """The reply to a request.

        Raises:
            ModelError: If the process died.
        """
        with self._lock:
            process = self.start()
            self._asked += 1
            try:
                self._send(process, {**request, "seconds": SECONDS, "number": self._asked})
                reply = self._receive(process)
                if reply.pop("number") != self._asked:
                    raise ModelError("the chat template cannot be rendered: its process replied to another request")
            except BaseException:  # an interrupt too: the late reply must not be taken for the next request's
                self.stop()
                raise
            if reply.get("error") == "MemoryError":
                self.stop()  # its state is unknown
            return reply

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _send(self, process: subprocess.Popen[str], content: object) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # reading then sees the end of file
            process.stdin.write(json.dumps(content) + "\n")
            process.stdin.flush()

    def _receive(self, process: subprocess.Popen[str]) -> JsonObject:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            status = process.wait()
            if status == (1 if sys.platform == "win32" else -signal.SIGALRM):
                raise ModelError(f"the chat template does not finish within {SECONDS:g} seconds; {_HINT}")
            raise ModelError(f"the chat template cannot be rendered: its process ended with status {status}")
        reply: JsonObject = json.loads(line)
        return reply


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)


def _template(processor: Templated) -> str:
    template = processor.chat_template
    if isinstance(template, Mapping):  # several by name
        if "default" not in template:
            raise ModelError(f"no chat template is named default (found {', '.join(map(str, template))}); rename one")
        template = template["default"]
    return str(template)


def _error(kind: str, message: str) -> ModelError:
    if kind == "MemoryError":
        return ModelError(f"the chat template needs too much memory; {_HINT}")
    if kind == "SecurityError":
        return ModelError(f"the chat template attempts a forbidden operation ({message}); {_HINT}")
    return TemplateRefusedError(f"the chat template cannot render this conversation ({message or kind})")
