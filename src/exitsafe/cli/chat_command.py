"""`exitsafe chat`: a picture and prompts -> the same prompt answered at several exits, side by side. Saves nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from exitsafe.cli import console
from exitsafe.errors import InputError
from exitsafe.specs.verbs import ChatSpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

    from exitsafe.engine.answering import Answering
    from exitsafe.engine.vlm import VLM
    from exitsafe.records import Response

_NARROWEST = 30  # columns that an answer beside others needs
_NOTICE = "Answers are unfiltered: whatever the model says is shown. Nothing is saved."
_WORDS_TO_LEAVE = ("exit", "quit")
_COULD_NOT = 2  # exit status


def chat_command(spec: ChatSpec, show: console.Show) -> None:
    """Answer a prompt about a picture at several exits and show the answers side by side.

    Answers are not filtered, and nothing is saved.
    """
    if spec.image is None:
        raise InputError("exits differ in what they see of a picture: give --image FILE")
    if show.as_json and spec.prompt is None:
        raise InputError("--json is for one prompt: give --prompt TEXT")
    picture = _open(spec.image)
    from exitsafe.cli.models import load_model
    from exitsafe.engine.answering import Answering
    from exitsafe.world.profile import profile_of

    vlm = load_model(spec.model, spec.loading)
    profile = profile_of(spec.model)
    longest = spec.max_new_tokens or (profile.max_new_tokens if profile else None)
    chat = Chat(
        vlm=vlm,
        answering=Answering(vlm, max_new_tokens=longest, temperature=spec.temperature, seed=spec.seed),
        exit_layers=_layers(vlm, spec.exit_layers),
        picture=picture,
    )
    if spec.prompt is not None:
        answers = chat.ask(spec.prompt)
        console.note(_NOTICE)
        document = {
            "model": spec.model,
            "adapter": spec.loading.adapter,
            "image": str(spec.image),
            "prompt": spec.prompt,
        }
        show(document | chat.document(answers), lambda: [chat.side_by_side(answers)])
        return
    console.note(_NOTICE)
    has_failed = False
    for line in _lines():
        try:
            answers = chat.ask(line)
        except InputError as error:  # this prompt cannot be asked; the next may
            console.complain(str(error))
            has_failed = True
            continue
        show({}, lambda found=answers: [chat.side_by_side(found)])  # type: ignore[misc]  # bound now
    if has_failed and not sys.stdin.isatty():  # a person has seen it; what feeds a pipe sees the status
        raise typer.Exit(_COULD_NOT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chat:
    """One picture, one model, several exits; no prompt knows of another.

    Args:
        vlm: The model.
        answering: With its decoding.
        exit_layers: Where to answer, the default exit among them.
        picture: What all prompts are about.
    """

    vlm: VLM
    answering: Answering
    exit_layers: tuple[int, ...]
    picture: Image

    def ask(self, prompt: str) -> list[Response]:
        """An answer per exit, from one pass of the encoder.

        Raises:
            InputError: If the prompt cannot be asked: too long, or with the model's image placeholder in it.
        """
        from exitsafe.engine.answering import Task
        from exitsafe.records import Sample

        sample = Sample(id="chat", prompt=prompt, images=(self.picture,), kind="benign")
        self.answering.check([sample], exit_layer=self.exit_layers[0])
        with _working(f"answering at {len(self.exit_layers)} exits"):
            answers = list(self.answering.answer([Task(sample=sample, exit_layers=self.exit_layers)]))
        return sorted(answers, key=lambda answer: answer.exit_layer)

    def differs(self, answer: Response, answers: Sequence[Response]) -> bool | None:
        """Whether an answer is not the default exit's; None where that says nothing: each exit draws for itself."""
        if self.answering.decoding["temperature"] > 0:
            return None
        return answer.text != next(each.text for each in answers if each.exit_layer == self.vlm.default_exit)

    def document(self, answers: Sequence[Response]) -> JsonObject:
        """For `--json`."""
        return {
            "default_exit": self.vlm.default_exit,
            "decoding": self.answering.decoding,
            "answers": [
                {
                    "exit_layer": answer.exit_layer,
                    "text": answer.text,
                    "num_tokens": answer.num_tokens,
                    "finish_reason": answer.finish_reason,
                    "differs_from_default": self.differs(answer, answers),
                }
                for answer in answers
            ],
        }

    def side_by_side(self, answers: Sequence[Response]) -> SideBySide:
        """For people."""
        titles = []
        for answer in answers:
            is_default = answer.exit_layer == self.vlm.default_exit
            remark = (
                "default" if is_default else {True: "differs", False: "same", None: ""}[self.differs(answer, answers)]
            )
            cut = ", cut off" if answer.finish_reason == "length" else ""
            titles.append(f"exit {answer.exit_layer}{', ' if remark else ''}{remark}{cut}")
        return SideBySide(titles=titles, texts=[_spaced(answer.text) for answer in answers])


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Answers in columns where the terminal is wide enough for them, else one below the other."""

    titles: Sequence[str]
    texts: Sequence[str]

    def __rich_console__(self, screen: Any, how: Any) -> Iterator[Any]:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        headings = [Text(title, style="bold yellow" if ", differs" in title else "bold") for title in self.titles]
        texts = [Text(text or "(no words)", style="" if text else "dim") for text in self.texts]
        if how.max_width < _NARROWEST * len(texts):
            yield from (
                Panel(text, title=heading, title_align="left") for heading, text in zip(headings, texts, strict=True)
            )
            return
        table = Table(expand=True)
        for heading in headings:
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*texts)
        yield table


def _spaced(text: str) -> str:
    """Convert a model's line ends and tabs for a terminal; the console replaces other unprintable characters."""
    return text.expandtabs(4).replace("\r\n", "\n")


def _open(image: Path) -> Image:
    from exitsafe.data.images import open_image

    try:
        return open_image(image, "")
    except InputError as error:
        raise InputError(f"--image: {str(error).partition(': ')[2]}") from error


def _layers(vlm: VLM, layers: str | None) -> tuple[int, ...]:
    """The exits asked for and the default one."""
    from exitsafe.exits.layers import resolve_layers
    from exitsafe.stats import layers_by_bin

    if layers is None:
        bins = layers_by_bin(vlm.exit_layers, vlm.num_layers)
        layers = ",".join(str(found[-1]) for found in list(bins.values())[:2])
    found = resolve_layers(layers, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    return tuple(sorted({*found, vlm.default_exit}))


def _lines() -> Iterator[str]:
    """Prompts from the terminal or a pipe, up to its end or `exit`."""
    if not sys.stdin.isatty():
        yield from _until_left(sys.stdin)
        return
    with suppress(ImportError):  # not on Windows; arrow keys then do what they do there
        import readline  # noqa: F401  # input() edits lines by it
    console.note("One prompt a line; exit or Ctrl-D to leave.")
    with suppress(EOFError):
        yield from _until_left(iter(lambda: input("> "), None))


def _until_left(lines: Iterable[str]) -> Iterator[str]:
    for line in map(str.strip, lines):
        if line in _WORDS_TO_LEAVE:
            return
        if line:
            yield line


def _working(what: str) -> AbstractContextManager[Any]:
    """A sign of life on a terminal, gone when done."""
    if not sys.stderr.isatty():
        return nullcontext()
    return console.screen(sys.stderr).status(what)
