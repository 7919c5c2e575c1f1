"""Exit layers: run the encoder's first l blocks only, and give the model back exactly as it was.

The cut is an *identity skip*: a block past the exit gets an instance attribute `forward` that returns its input.
The model's own code then reads the exit's hidden state wherever it wants a deeper one, so class-token drop, norms,
tiles, mergers and projector stay the model's own. Knows nothing about prompts or generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Hook = tuple[nn.Module, Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]]
"""A module, and what its inputs pass before it: a forward pre-hook."""

_MISSING = object()


class ExitStack:
    """The exits that are in force on one model, innermost last. Only the innermost acts."""

    def __init__(self) -> None:
        self._active: list[_Patch] = []

    @contextmanager
    def enter(self, patch: _Patch) -> Iterator[None]:
        """Put `patch` in force; leaving, also by an exception, puts the outer one back."""
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
    """Replaced `forward`s, hooks and config entries, applied and removed as often as wanted."""

    def __init__(
        self,
        forwards: Sequence[tuple[nn.Module, Callable[..., Any]]],
        settings: Sequence[tuple[Any, str, Any]] = (),
        hooks: Sequence[Hook] = (),
    ) -> None:
        self._forwards = forwards
        self._settings = settings
        self._hooks = hooks
        self._undo: list[tuple[Any, str, Any]] = []
        self._handles: list[RemovableHandle] = []

    def apply(self) -> None:
        assert not self._undo
        for module, forward in self._forwards:
            # A device-map hook may have put an instance attribute there already.
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
    settings: Sequence[tuple[Any, str, Any]],
    *,
    exit_layer: int,
    skip_global: bool,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Skip the blocks past `exit_layer`, and the global blocks where asked; `hooks` act meanwhile."""
    skipped = [*blocks[exit_layer:], *(global_blocks if skip_global else ())]
    return _Patch([(block, _identity) for block in skipped], settings, hooks)


def replay_patch(
    blocks: Sequence[nn.Module],
    global_blocks: Sequence[nn.Module],
    settings: Sequence[tuple[Any, str, Any]],
    stored: Sequence[Tensor],
    *,
    exit_layer: int,
    skip_global: bool,
    hooks: Sequence[Hook] = (),
) -> _Patch:
    """Let block i return `stored[min(i, exit_layer - 1)]`: the exit's features with no block computed."""
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
        (block, _constant(stored[min(index, exit_layer - 1)])) for index, block in enumerate(blocks)
    ]
    forwards += [(block, _identity) for block in (global_blocks if skip_global else ())]
    return _Patch(forwards, settings, hooks)


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: output
