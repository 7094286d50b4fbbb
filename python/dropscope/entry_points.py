"""torch's entry points while an interceptor is open: which modules run, and what a checkpoint recomputes.

The modules that run are read off Python's own stack, so they are right whatever is raised and nothing has to be hooked.
torch switches function modes off inside backward, where activation checkpoints recompute; so while an interceptor is
open in a process, the two entry points of ``torch.utils.checkpoint`` bind the function to its frame, and are restored
when the last one closes. In a thread that has no interceptor open they do what they always do. Where a graph is to be
differentiated, :func:`direct_checkpoints` has them call the function and nothing else. Compiled callables run eagerly
meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import nn

_CALL = nn.Module._call_impl.__code__


class Mode(AbstractContextManager[Any], Protocol):
    """What a checkpoint must know of an interceptor."""

    tally: dict[str, int]
    recomputing: bool


class Open(threading.local):
    """The interceptors open in this thread, innermost last, and whether checkpoints are passed over."""

    def __init__(self) -> None:
        self.modes: list[Mode] = []
        self.direct = False


here = Open()


def running() -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The modules running in this thread and their arguments, innermost first.

    A recomputation goes on with the modules that ran in its forward, without their arguments.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            given = frame.f_locals
            yield given["self"], (*given["args"], *given["kwargs"].values())
        elif frame.f_code is _RECOMPUTE:
            yield from ((module, ()) for module in frame.f_locals["self"].modules)
            return
        frame = frame.f_back  # type: ignore[assignment]


class Patches:
    """What is changed in torch, counted over all threads and nested contexts under one lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.saved: list[tuple[Any, str, Any]] = []
        self.stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                checkpoint, generator = torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"
                if hasattr(checkpoint, generator + "_impl"):  # torch 2.15: the one that every caller goes through
                    generator += "_impl"
                self._replace(checkpoint, "CheckpointFunction", _BoundReentrant(checkpoint.CheckpointFunction))
                bound = _bound_generator(getattr(checkpoint, generator))
                for module in (checkpoint, sys.modules.get("torch.distributed._composable.checkpoint_activation")):
                    if module is not None and hasattr(module, generator):
                        self._replace(module, generator, bound)
            # Before Dynamo is imported there are no compiled callables. The stance is global, hence set here.
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")

    def _replace(self, owner: Any, name: str, value: Any) -> None:
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


@contextlib.contextmanager
def direct_checkpoints() -> Iterator[None]:
    """In this thread, checkpointed functions are simply called, so that their graph is that of any other function.

    A checkpoint can recompute neither after the mode or the parameters of the model have been put back, nor, where it
    is reentrant, for ``torch.autograd.grad``, a second derivative or dual numbers.
    """
    before = here.direct
    with patches:
        here.direct = True
        try:
            yield
        finally:
            here.direct = before


class _BoundReentrant:
    """Stands for ``CheckpointFunction``: its function runs once in forward, then again in backward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def apply(self, function: Callable[..., Any], preserve: bool, *inputs: Any) -> Any:
        args = preserve, *inputs
        if here.direct:
            return function(*inputs)
        if not here.modes:
            return self.original.apply(function, *args)
        frame = _Frame()
        forward = True

        def bound(*inputs: Any) -> Any:
            nonlocal forward
            if forward:
                forward = False
                return function(*inputs)
            return frame.recompute(function, inputs, {})

        return self.original.apply(bound, *args)


def _bound_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """The generator behind ``use_reentrant=False`` calls its function only to recompute."""

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if here.direct:
            return iter((None,))  # its caller calls the function between two steps of the generator
        if not here.modes:
            return original(function, *args, **kwargs)
        frame = _Frame()

        def bound(*inputs: Any, **named: Any) -> Any:
            return frame.recompute(function, inputs, named)

        return original(bound, *args, **kwargs)

    return generator


class _Frame:
    """Where a checkpointed function stood in its forward: what its recomputation must find again."""

    def __init__(self) -> None:
        self.modules = [module for module, _ in running()]
        self.modes = [(mode, dict(mode.tally)) for mode in here.modes]

    def recompute(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function in its frame, in whichever thread backward runs, inside or after the context."""
        before = here.modes, [(mode, mode.tally, mode.recomputing) for mode, _ in self.modes]
        entered = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        with contextlib.ExitStack() as stack:
            stack.enter_context(patches)
            here.modes = [mode for mode, _ in self.modes]
            try:
                for mode, tally in self.modes:
                    mode.tally, mode.recomputing = dict(tally), True
                    if not any(mode is other for other in entered):
                        stack.enter_context(mode)
                return function(*args, **kwargs)
            finally:
                here.modes = before[0]
                for mode, tally, recomputing in before[1]:
                    mode.tally, mode.recomputing = tally, recomputing


_RECOMPUTE = _Frame.recompute.__code__
