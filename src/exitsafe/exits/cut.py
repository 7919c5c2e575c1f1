"""The exit's cut: run only the encoder's first l blocks, then restore the model exactly.

The cut is an *identity skip*: a block past the exit gets an instance attribute `forward` that returns its input.
The model's own code then reads the exit's hidden state wherever it wants a deeper one, so class-token drop, norms,
tiles, mergers and projector stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Hook = tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]]
"""A module and its forward pre-hook, which maps the module's inputs."""
ConfigEntry: TypeAlias = "tuple[PretrainedConfig, str, int | list[int]]"
"""A config, the name of one of its entries, and a value for it."""

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
    """Replaced `forward`s, hooks and config entries that can be applied and removed repeatedly."""

    def __init__(
        self,
        forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]],
        settings: Sequence[ConfigEntry] = (),
        hooks: Sequence[Hook] = (),
    ) -> None:
        self._forwards = forwards
        self._settings = settings
        self._hooks = hooks
        self._undo: list[tuple[nn.Module | PretrainedConfig, str, object]] = []
        self._handles: list[RemovableHandle] = []

    def apply(self) -> None:
        assert not self._undo
        for module, forward in self._forwards:
            # A device-map hook may already have set an instance attribute.
            self._undo.append((module, "forward", module.__dict__.get("forward", _MISSING)))
            module.forward = forward
        for config, name, value in self._settings:
            self._undo.append((config, name, getattr(config, name)))
            setattr(config, name, value)
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
    blocks: Sequence[nn.Module],
    global_blocks: Sequence[nn.Module],
    settings: Sequence[ConfigEntry],
    *,
    exit_layer: int,
    skip_global: bool,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Skip the blocks past `exit_layer` and, if asked, the global blocks, with `hooks` registered."""
    skipped = [*blocks[exit_layer:], *(global_blocks if skip_global else ())]
    return _Patch([(block, _identity) for block in skipped], settings, hooks)


def replay_patch(
    blocks: Sequence[nn.Module],
    global_blocks: Sequence[nn.Module],
    settings: Sequence[ConfigEntry],
    stored: Sequence[Tensor],
    *,
    exit_layer: int,
    skip_global: bool,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Let block i return `stored[min(i, exit_layer - 1)]`: the exit's features without computing a block."""
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = [
        (block, _constant(stored[min(index, exit_layer - 1)])) for index, block in enumerate(blocks)
    ]
    forwards += [(block, _identity) for block in (global_blocks if skip_global else ())]
    return _Patch(forwards, settings, hooks)


def _identity(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: output
