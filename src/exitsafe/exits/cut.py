"""The exit's cut: run only the encoder's first l blocks, then restore the model exactly.

The cut is an *identity skip*: a block past the exit gets an instance attribute `forward` that returns its input, in the
structure that the block returns. The model's own code then reads the exit's hidden state wherever it wants a deeper
one, so class-token drop, norms, tiles, mergers and projector stay the model's own.

Deepstack (Qwen3-VL) is the exception: mergers beside the blocks read the hidden state on the way, and with a skip they
would read the exit's again. There the cut is a *slice*: the list of blocks is shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exitsafe.exits.encoder import Encoder, first_tensor, global_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Hook = tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]]
"""A module and its forward pre-hook, which maps the module's inputs."""
ConfigEntry: TypeAlias = "tuple[PretrainedConfig, str, int | list[int]]"
"""A config, the name of one of its entries, and a value for it."""
_Change: TypeAlias = "tuple[nn.Module | PretrainedConfig, str, object]"
"""An object, the name of one of its attributes, and a value for it."""

_MISSING = object()


class ExitStack:
    """The active exits of one model, innermost last. Only the innermost applies."""

    def __init__(self) -> None:
        self._active: list[_Patch] = []

    @contextmanager
    def enter(self, patch: _Patch) -> Iterator[None]:
        """Apply `patch`; afterwards, also after an exception, the outer one applies again."""
        if self._active:
            self._active[-1].remove()
        self._active.append(patch)
        patch.apply()
        try:
            yield
        finally:
            patch.remove()
            self._active.pop()
            if self._active:
                self._active[-1].apply()


class _Patch:
    """Changed attributes and hooks that can be applied and removed repeatedly."""

    def __init__(self, changes: Sequence[_Change], hooks: Sequence[Hook] = ()) -> None:
        self._changes = changes
        self._hooks = hooks
        self._undo: list[_Change] = []
        self._handles: list[RemovableHandle] = []

    def apply(self) -> None:
        assert not self._undo
        for owner, name, value in self._changes:
            # `forward` is the class's, unless a device-map hook has set an instance attribute
            old = owner.__dict__.get(name, _MISSING) if name == "forward" else getattr(owner, name)
            self._undo.append((owner, name, old))
            setattr(owner, name, value)
        for module, hook in self._hooks:
            self._handles.append(module.register_forward_pre_hook(hook))

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            owner, name, old = self._undo.pop()
            if old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def skip_patch(
    model: nn.Module,
    encoder: Encoder,
    blocks: Sequence[nn.Module],
    settings: Sequence[ConfigEntry] = (),
    *,
    exit_layer: int,
    skip_global: bool = False,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Skip the encoder's `blocks` past `exit_layer` and, if asked, the global blocks, with `hooks` registered."""
    forwards: list[_Change] = [
        (block, "forward", _identity(encoder.num_returned)) for block in blocks[exit_layer:] if not encoder.is_sliced
    ]
    forwards += [(block, "forward", _identity(0)) for block in (global_blocks(model) if skip_global else ())]
    return _Patch([*_slice(model, encoder, blocks[:exit_layer]), *forwards, *settings], hooks)


def replay_patch(
    model: nn.Module,
    encoder: Encoder,
    blocks: Sequence[nn.Module],
    settings: Sequence[ConfigEntry],
    stored: Sequence[object],
    *,
    exit_layer: int,
    skip_global: bool = False,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Let block i return `stored[min(i, exit_layer - 1)]`: the exit's features without computing a block."""
    run = blocks[:exit_layer] if encoder.is_sliced else blocks
    forwards: list[_Change] = [
        (block, "forward", _constant(stored[min(index, exit_layer - 1)])) for index, block in enumerate(run)
    ]
    forwards += [(block, "forward", _identity(0)) for block in (global_blocks(model) if skip_global else ())]
    return _Patch([*_slice(model, encoder, run), *forwards, *settings], hooks)


def _slice(model: nn.Module, encoder: Encoder, blocks: Sequence[nn.Module]) -> list[_Change]:
    """The shorter list of blocks, where an exit is a slice."""
    parent, _, name = encoder.path.rpartition(".")
    return [(model.get_submodule(parent), name, nn.ModuleList(blocks))] if encoder.is_sliced else []


def _identity(num_returned: int) -> Callable[..., object]:
    """A block's `forward` that returns its first tensor: bare, or first in a tuple of this length."""

    def forward(*args: object, **kwargs: object) -> object:
        hidden_states = first_tensor((args, kwargs))
        return (hidden_states, *[None] * (num_returned - 1)) if num_returned else hidden_states

    return forward


def _constant(output: object) -> Callable[..., object]:
    return lambda *args, **kwargs: output
