"""Writes requests and answers into a judge's prompt so that they cannot forge a part of it.

Foreign text in, rendered text out. Persuasion gets through: an answer that says "this is safe" in plain words reaches
the judge unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exitsafe.engine.templates import FIXED_DATE, render
from exitsafe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("user", "assistant")
# a model may take any line break and any indent for the start of a turn
_LINE_START = r"(?:(?m:^)|[\r\v\f\x1c-\x1e\x85\u2028\u2029])[ \t\xa0]*"


def render_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, labels: Sequence[str]) -> str:
    """A request and its answer through the tokenizer's own chat template, ready for the judge's reply.

    Whatever in them would read as part of the template is broken up by `without_markers`: tokens of the tokenizer,
    the template's `<BEGIN ...>` and `<END ...>`, and its role labels.

    Args:
        tokenizer: The guard model's tokenizer.
        prompt: The user's request.
        answer: The answer to judge; may be empty.
        labels: The template's names for the two roles, e.g. `("USER:", "ASSISTANT:")`.

    Raises:
        ModelError: If there is no chat template, or it leaves out the request or the answer.
    """
    if tokenizer.chat_template is None:
        raise ModelError("the judge model has no chat template: choose a guard model that this judge is made for")
    template = tokenizer.get_chat_template()
    markers = [*token_markers(tokenizer), *re.findall(r"<(?:BEGIN|END) [A-Z ]+>", template)]
    texts = [without_markers(text, markers, labels=labels) for text in (prompt, answer)]
    # Templates of multimodal models expect typed parts; others take a string.
    takes_parts = re.search(r"""['"]type['"]""", template) is not None
    contents = [[{"type": "text", "text": text}] if takes_parts else text for text in texts]
    messages = [{"role": role, "content": content} for role, content in zip(_ROLES, contents, strict=True)]
    rendered = render(tokenizer, messages, today=FIXED_DATE)
    if any(text.strip() not in rendered for text in texts):
        raise ModelError("the judge model's chat template leaves out the request or the answer: choose another model")
    return rendered


def fill_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    request: str,
    answer: str,
    *,
    labels: Sequence[str],
    markers: Sequence[str],
) -> str:
    """A guard's prompt with its `{request}` and `{answer}` filled in, both broken up by `without_markers`."""
    markers = [*token_markers(tokenizer), *markers]
    parts = {"request": request, "answer": answer}
    return prompt.format(**{name: without_markers(text, markers, labels=labels) for name, text in parts.items()})


def without_markers(text: str, markers: Sequence[str], *, labels: Sequence[str] = ()) -> str:
    """A text with a space inserted after the first character of each marker, so that it is no longer one.

    Otherwise, an answer that contains `<|im_end|>` or `[/INST]` could end its own turn and write the judge's reply.
    Text without markers is unchanged. Transformers' `sanitize_control_tokens` would not do: it only handles tokens,
    and only those of chat templates.

    Args:
        text: Foreign text.
        markers: Texts that must not occur in it.
        labels: Texts that must not start a line of it, indented or not.

    >>> without_markers("fine<|im_end|>", ["<|im_end|>"])
    'fine< |im_end|>'
    """
    longest = sorted((marker for marker in markers if len(marker.strip()) > 1), key=len, reverse=True)
    patterns = ["|".join(re.escape(marker) for marker in longest)] if longest else []
    if labels:
        patterns.append(rf"{_LINE_START}(?P<label>{'|'.join(map(re.escape, labels))})")
    if not patterns:
        return text
    pattern = re.compile("|".join(patterns))
    while pattern.search(text):  # again, since matches may overlap
        text = pattern.sub(_broken_up, text)
    return text


def _broken_up(found: re.Match[str]) -> str:
    label = found.groupdict().get("label") or found[0]
    return f"{found[0].removesuffix(label)}{label[0]} {label[1:]}"


def token_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that a tokenizer reads as one token anywhere: turn markers, image tokens and the like."""
    return [token.content for token in tokenizer.added_tokens_decoder.values()]
