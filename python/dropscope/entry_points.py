"""torch's entry points while an interceptor is open: who runs, and what a checkpoint recomputes.

While at least one interceptor is open in a process, three entry points of torch are wrapped, and restored when the
last one closes: ``nn.Module.__call__`` (to know the running module, exactly, whatever is raised) and the two entry
points of ``torch.utils.checkpoint``, because torch switches function modes off inside backward, where checkpoints
recompute. A wrapper does nothing in a thread that has no interceptor open. Compiled callables run eagerly meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import nn

if TYPE_CHECKING:
    from dropscope.intercept import Interceptor


class Frames(threading.local):
    """What runs in this thread: modules with their arguments, and open interceptors, innermost last."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.open: list[Interceptor] = []


frames = Frames()


class Patches:
    """The wrapping, counted over all threads and nested contexts under one lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.saved: list[tuple[Any, str, Any]] = []
        self.stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                checkpoint = torch.utils.checkpoint
                self._wrap(nn.Module, "__call__", _tracked(nn.Module.__call__))
                self._wrap(checkpoint, "CheckpointFunction", _BoundReentrant(checkpoint.CheckpointFunction))
                generator = "_checkpoint_without_reentrant_generator"
                if hasattr(checkpoint, generator + "_impl"):  # torch 2.15: the one that every caller goes through
                    generator += "_impl"
                bound = _bound_generator(getattr(checkpoint, generator))
                for module in (checkpoint, sys.modules.get("torch.distributed._composable.checkpoint_activation")):
                    if module is not None and hasattr(module, generator):
                        self._wrap(module, generator, bound)
            # Before Dynamo is imported there are no compiled callables. The stance is global, hence set here.
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")

    def _wrap(self, owner: Any, name: str, value: Any) -> None:
        self.saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                while self.saved:
                    owner, name, value = self.saved.pop()
                    setattr(owner, name, value)
                if self.stance is not None:
                    self.stance.__exit__(None, None, None)
                    self.stance = None


patches = Patches()


def _tracked(call: Callable[..., Any]) -> Callable[..., Any]:
    def tracked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not frames.open:
            return call(self, *args, **kwargs)
        modules = frames.modules
        modules.append((self, (*args, *kwargs.values())))
        try:
            return call(self, *args, **kwargs)
        finally:
            modules.pop()

    return tracked


class _BoundReentrant:
    """Stands for ``CheckpointFunction``: its function runs once in forward, then again in backward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        if not frames.open:
            return self.original.apply(function, *args)
        frame = _Frame()
        forward = True

        def bound(*inputs: Any) -> Any:
            nonlocal forward
            if forward:
                forward = False
                return function(*inputs)
            with frame.resumed():
                return function(*inputs)

        return self.original.apply(bound, *args)


def _bound_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """The generator behind ``use_reentrant=False`` calls its function only to recompute."""

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not frames.open:
            return original(function, *args, **kwargs)
        frame = _Frame()

        def bound(*inputs: Any, **named: Any) -> Any:
            with frame.resumed():
                return function(*inputs, **named)

        return original(bound, *args, **kwargs)

    return generator


class _Frame:
    """Where a checkpointed function stood in its forward: what its recomputation must find again."""

    def __init__(self) -> None:
        self.modules = [(module, ()) for module, _ in frames.modules]  # arguments would keep activations alive
        self.open = [(mode, dict(mode.tally)) for mode in frames.open]

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Restore the frame, in whichever thread backward runs, inside or after the context."""
        before = (frames.modules, frames.open, [(mode, mode.tally, mode.recomputing) for mode, _ in self.open])
        entered = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        with contextlib.ExitStack() as stack:
            stack.enter_context(patches)
            frames.modules, frames.open = list(self.modules), [mode for mode, _ in self.open]
            try:
                for mode, tally in self.open:
                    mode.tally, mode.recomputing = dict(tally), True
                    if not any(mode is other for other in entered):
                        stack.enter_context(mode)
                yield
            finally:
                frames.modules, frames.open = before[:2]
                for mode, tally, recomputing in before[2]:
                    mode.tally, mode.recomputing = tally, recomputing
