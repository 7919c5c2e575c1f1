"""Hugging Face weights for judges: identify them, load them at first use, generate short greedy replies.

Only safetensors are loaded; code from a checkpoint never runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.hub import cached_file

from exitsafe.engine.load import check_no_adapter, hash_files
from exitsafe.errors import ModelError, first_line
from exitsafe.exits.sources import unreachable
from exitsafe.judges.protocol import UNREADABLE
from exitsafe.machine.devices import find_device, find_dtype
from exitsafe.machine.memory import BatchSize, release_memory
from exitsafe.untrusted import JsonObject, UnreadableError, read_json, without_surrogates

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from exitsafe.exits.huggingface import LanguageModel

TOO_LONG = "the prompt is longer than the judge's context"
NOT_FINITE = "the model returned no number"
_NO_MEMORY = (
    "out of memory while the judge scores a single answer beside the model: judge in a second pass "
    "(--config judge_pass=second) or on another device (--config judge_device=cpu)"
)

Result = TypeVar("Result")
# The HTTP library's base class: when a proxy refuses, the Hub's client raises an error that is not its own.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
# What the libraries raise for corrupt files, missing parts and missing devices.
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AssertionError, SafetensorError)


class JudgeModel:
    """A model and its tokenizer, loaded at first use.

    Args:
        model: A Hub id, or a folder written by `save_pretrained`.
        auto_class: The transformers class to load with, e.g. `AutoModelForSequenceClassification`; None chooses the
            generative class that fits the checkpoint.
        revision: A branch, tag or commit of the Hub id.
        dtype: "auto" (as saved), or e.g. "bfloat16".
        device: "auto" (this process's GPU, else the CPU), or e.g. "cuda:1".
    """

    def __init__(
        self,
        model: str,
        *,
        auto_class: type[_BaseAutoModelClass] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        self.model, self.auto_class, self.revision, self.dtype, self.device = model, auto_class, revision, dtype, device
        self._loaded: tuple[LanguageModel, PreTrainedTokenizerBase] | None = None

    @cached_property
    def settings(self) -> JsonObject:
        """What identifies the weights, found without loading them.

        Raises:
            ModelError: If the model is not available.
        """
        identity = model_identity(self.model, self.revision)
        device = find_device(self.device).type  # kernels round differently
        return {"model": self.model, "revision": identity, "dtype": self.dtype, "device": device}

    def load(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """The model in evaluation mode and its tokenizer.

        Raises:
            ModelError: If they cannot be loaded.
        """
        if self._loaded is None:
            # the commit that `settings` names, even if the branch has moved on since
            identity = self.settings["revision"]
            revision = None if Path(self.model).is_dir() else identity
            self._loaded = load_judge_model(
                self.auto_class, self.model, revision=revision, dtype=self.dtype, device=self.device
            )
        return self._loaded

    def unload(self) -> None:
        """Free the memory; the next `load` loads again."""
        self._loaded = None
        release_memory()


def model_identity(model: str, revision: str | None = None) -> str:
    """The commit of a Hub id or the content hash of a local folder, without loading weights.

    For a branch in the local cache this is the commit cached for it, so that a restarted run finds the same weights;
    `hf download ID` updates it. Otherwise the Hub is asked.

    Raises:
        ModelError: If the model is not available.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{model} has no config.json: give a Hub id or a folder written by save_pretrained")
        return hash_files(folder)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise ModelError(f"{model} does not exist: give a Hub id or a folder written by save_pretrained")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        try:
            config = hf_hub_download(model, "config.json", revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            config = hf_hub_download(model, "config.json", revision=revision)
    except (_CLIENT_ERROR, EntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(_not_available(model, revision, error)) from error
    return Path(config).parent.name  # snapshots/COMMIT/config.json


def is_downloaded(model: str) -> bool:
    """Whether a model's weights are on this machine: a folder, or in the Hub's cache."""
    files = ("model.safetensors", "model.safetensors.index.json")
    return Path(model).is_dir() or any(isinstance(try_to_load_from_cache(model, file), str) for file in files)


def load_judge_model(
    auto_class: type[_BaseAutoModelClass] | None,
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer; the arguments are those of `JudgeModel`.

    Raises:
        ModelError: If they cannot be loaded.
    """
    where, as_type = find_device(device), find_dtype(dtype) or "auto"
    source: JsonObject = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **source)
        check_no_adapter(model, revision=revision)
        auto_class = auto_class or (AutoModelForImageTextToText if config.sub_configs else AutoModelForCausalLM)
        loaded = auto_class.from_pretrained(
            model, config=_readable(config), dtype=as_type, use_safetensors=True, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processor_template(model, revision)
        return loaded.to(where).eval(), tokenizer
    except _LOADING_ERRORS as error:
        hint = "" if Path(model).is_dir() else f"; if you are offline, download it first: hf download {model}"
        raise ModelError(f"cannot load the judge model {model}: {first_line(error)}{hint}") from error


def greedy_replies(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    add_special_tokens: bool = False,
) -> list[str | None]:
    """The most likely reply to each rendered prompt, in order; None where the prompt exceeds the model's context, and
    `NOT_FINITE`, which no judge reads as a verdict, where the model's logits are NaN or infinite.

    Args:
        model: A generative model.
        tokenizer: Its tokenizer.
        prompts: Fully rendered prompts; never truncated.
        max_new_tokens: Longest reply, in tokens.
        batch_size: Prompts at a time; halved when memory runs out.
        add_special_tokens: Whether the tokenizer adds a begin-of-sequence token and the like; a chat template has
            already written them.
    """
    rows = encode(tokenizer, prompts, add_special_tokens=add_special_tokens)
    fits = [len(row) + max_new_tokens <= context_length(model) for row in rows]
    pad_id = pad_token_id(tokenizer)
    # Every field is replaced: a checkpoint's own sampling settings must not change a verdict.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )

    def reply(batch: Sequence[list[int]]) -> list[str]:
        input_ids, attention_mask = pad_rows(batch, pad_id, side="left")
        checked = _FiniteLogits()
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                logits_processor=LogitsProcessorList([checked]),
            )
        replies: list[str] = tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text if fine else NOT_FINITE for text, fine in zip(replies, checked.are_finite(), strict=True)]

    found = iter(longest_first(reply, [row for row, fit in zip(rows, fits, strict=True) if fit], batch_size=batch_size))
    return [next(found) if fit else None for fit in fits]


class _FiniteLogits(LogitsProcessor):
    """Records which rows of a batch had logits that are not a distribution; changes nothing."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._steps.append(scores.amax(dim=-1).isfinite())  # (B,)
        return scores

    def are_finite(self) -> list[bool]:
        found: list[bool] = torch.stack(self._steps).all(dim=0).tolist()
        return found


def why_unread(reply: str | None) -> str:
    """Why a reply of `greedy_replies` contains no verdict."""
    return TOO_LONG if reply is None else NOT_FINITE if reply == NOT_FINITE else UNREADABLE


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text, never truncated."""
    if not texts:
        return []
    clean = [without_surrogates(text) for text in texts]
    rows: list[list[int]] = tokenizer(clean, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return rows


def longest_first(
    function: Callable[[Sequence[list[int]]], Sequence[Result]], rows: Sequence[list[int]], *, batch_size: int
) -> list[Result]:
    """Apply a function to batches of token rows, longest rows first; one result per row, in the given order.

    Rows of similar length need little padding, and memory runs out in the first batch if at all; it is then halved.

    Raises:
        RunError: If memory runs out with a single row.

    >>> longest_first(lambda batch: [len(row) for row in batch], [[1], [1, 2, 3], [1, 2]], batch_size=2)
    [1, 3, 2]
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches = BatchSize(batch_size, problem=_NO_MEMORY).batches(function, [rows[index] for index in order])
    by_index = dict(zip(order, chain.from_iterable(batches), strict=True))
    return [by_index[index] for index in range(len(rows))]


def pad_rows(rows: Sequence[list[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T) on the CPU; pad left to generate, right to classify."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for place, row in enumerate(rows):
        filled = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        input_ids[place, filled] = torch.tensor(row, dtype=torch.long)
        attention_mask[place, filled] = 1
    return input_ids, attention_mask


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; any will do, since the attention mask hides it."""
    return next(int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def context_length(model: LanguageModel) -> int:
    """The model's context in tokens, prompt and reply together."""
    return int(model.config.get_text_config().max_position_embeddings)


def _readable(config: PretrainedConfig) -> PretrainedConfig:
    """Give Llama Guard 4 a chunk size: it is saved without one, which transformers cannot run; one chunk is the same.

    Source: https://github.com/meta-llama/PurpleLlama/issues/119.
    """
    text_config = config.get_text_config()
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        text_config.attention_chunk_size = text_config.attention_chunk_size or text_config.max_position_embeddings
    return config


def _processor_template(model: str, revision: str | None) -> str | None:
    """The chat template from the file in which processors of multimodal models used to keep it."""
    path = cached_file(model, "chat_template.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        return str(read_json(Path(path))["chat_template"])
    except (UnreadableError, KeyError) as error:
        reason = error if isinstance(error, UnreadableError) else "it has no chat_template"
        raise ModelError(f"{path} cannot be read ({reason}): download the judge model again") from error


def _not_available(model: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{model} is gated: accept the licence at https://huggingface.co/{model} and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision}: give one of its branches, tags or commits"
    if isinstance(error, RepositoryNotFoundError):
        return f"{model} is not on the Hub or is private: check the id, or log in with `hf auth login`"
    return unreachable(model, error) or f"cannot find {model}: {first_line(error)}"
