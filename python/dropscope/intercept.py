"""The one TorchFunctionMode: hands torch functions to handlers, and knows the module that runs.

While at least one interceptor is open in a process, three entry points of torch are wrapped, and restored when the
last one closes: ``nn.Module.__call__`` (to know the running module, exactly, whatever is raised) and the two entry
points of ``torch.utils.checkpoint``, because torch switches function modes off inside backward, where checkpoints
recompute. A wrapper does nothing in a thread that has no interceptor open.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel"}


@dataclass(slots=True)
class Call:
    """One call of a torch function on its way to a handler."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: Interceptor

    @property
    def path(self) -> str:
        """Name of the innermost named module running; empty outside any."""
        return self.mode.path

    def proceed(self) -> Any:
        """Call the function itself, with this interceptor off."""
        return self.func(*self.args, **self.kwargs)


Handler = Callable[[Call], Any]


class _Frames(threading.local):
    """What runs in this thread: modules with their arguments, and open interceptors, innermost last."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.open: list[Interceptor] = []


_frames = _Frames()


class Interceptor(TorchFunctionMode):
    """Hands each call of a torch function that has a handler to it, while entered.

    Args:
        handlers: what to do for each function, keyed by the function as torch passes it to function modes
            (``F.linear``, ``torch.Tensor.matmul``). A handler takes a :class:`Call` and returns the result, or
            ``NotImplemented`` to let the call through. It runs with the interceptor off.
        model: names the running modules; without it every path is empty.
    """

    def __init__(self, handlers: Mapping[Callable[..., Any], Handler], model: nn.Module | None = None) -> None:
        super().__init__()
        self._entered: list[contextlib.ExitStack] = []
        self.handlers = chained(handlers, {F.multi_head_attention_forward: attention_body})
        self.names = {} if model is None else {id(module): name for name, module in module_names(model).items()}
        self.model = model  # keeps the ids of its modules alive
        self.tally: dict[str, int] = {}
        """Counts since the context was entered; a checkpoint's recomputation finds them as its forward did."""
        self.recomputing = False
        """Whether a checkpoint's recomputation runs: handlers that record must not record twice."""
        self.operators: set[str] = set()
        """Operators of ``torch.ops`` called by name, which no handler knows."""
        self.shared: set[str] = set()
        """Calls whose mask the whole batch shares although masks are per sample: on parameters, single numbers."""

    @property
    def path(self) -> str:
        """Name of the innermost named module running; empty outside any."""
        for module, _ in reversed(_frames.modules):
            name = self.names.get(id(module))
            if name is not None:
                return name
        return ""

    @property
    def running(self) -> list[tuple[nn.Module, tuple[Any, ...]]]:
        """The modules running in this thread and their arguments, innermost last."""
        return _frames.modules

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = self.handlers.get(func)
        if handler is not None:
            result = handler(Call(func, args, kwargs or {}, self))
            if result is not NotImplemented:
                return result
        elif isinstance(func, _OPERATORS):
            self.operators.add(f"{func} in module {self.path!r}")
        return func(*args, **kwargs) if kwargs else func(*args)

    def __enter__(self) -> Interceptor:
        """Track module paths, bind checkpoints, run compiled callables eagerly; inside itself, only switch on again."""
        with contextlib.ExitStack() as stack:
            if not any(self is mode for mode in _frames.open):
                stack.enter_context(_patches)
                stack.enter_context(_eager())
                _frames.open.append(self)
                stack.callback(_frames.open.remove, self)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._entered.pop().close()


def chained(*tables: Mapping[Callable[..., Any], Handler]) -> dict[Callable[..., Any], Handler]:
    """One table of several: for a function in more than one, the first handler that does not let it through."""
    merged: dict[Callable[..., Any], Handler] = {}
    for table in tables:
        merged |= {func: _either(merged[func], rule) if func in merged else rule for func, rule in table.items()}
    return merged


def _either(first: Handler, second: Handler) -> Handler:
    def handler(call: Call) -> Any:
        result = first(call)
        return second(call) if result is NotImplemented else result

    return handler


def attention_body(call: Call) -> Any:
    """Run the Python body of ``F.multi_head_attention_forward`` under the mode: torch hides what is inside."""
    with call.mode:
        return _ATTENTION_BODY(*call.args, **call.kwargs)


_ATTENTION_BODY = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False},
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)
_ATTENTION_BODY.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """``named_modules()`` with the prefixes of wrappers removed: compiled, DDP, FSDP, averaged, checkpoint wrapper.

    A wrapper and what it wraps share a name; the dict keeps the wrapped module.
    """
    names: dict[str, nn.Module] = {}
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        kinds[name] = type(module).__name__
        kept: list[str] = []
        prefix = ""
        for part in name.split(".") if name else []:
            if part not in _WRAPPED and not (part == "module" and kinds.get(prefix) in _WRAPPERS):
                kept.append(part)
            prefix = f"{prefix}.{part}" if prefix else part
        names[".".join(kept)] = module
    return names


class _Patches:
    """Wraps torch's entry points while anything is open; counted under a lock, so contexts nest and threads mix."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                checkpoint = torch.utils.checkpoint
                self._wrap(nn.Module, "__call__", _tracked(nn.Module.__call__))
                self._wrap(checkpoint, "CheckpointFunction", _BoundReentrant(checkpoint.CheckpointFunction))
                generator = "_checkpoint_without_reentrant_generator"
                bound = _bound_generator(getattr(checkpoint, generator))
                for module in (checkpoint, sys.modules.get("torch.distributed._composable.checkpoint_activation")):
                    if module is not None and hasattr(module, generator):
                        self._wrap(module, generator, bound)

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


_patches = _Patches()


def _tracked(call: Callable[..., Any]) -> Callable[..., Any]:
    def tracked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _frames.open:
            return call(self, *args, **kwargs)
        modules = _frames.modules
        modules.append((self, (*args, *kwargs.values())))
        try:
            return call(self, *args, **kwargs)
        finally:
            modules.pop()

    return tracked


def _eager() -> AbstractContextManager[Any]:
    """Compiled callables run eagerly; when Dynamo was never imported there are none."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _BoundReentrant:
    """Stands for ``CheckpointFunction``: its function runs once in forward, then again in backward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        if not _frames.open:
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
        if not _frames.open:
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
        self.modules = list(_frames.modules)
        self.open = [(mode, dict(mode.tally)) for mode in _frames.open]

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Restore the frame, in whichever thread backward runs, inside or after the context."""
        before = (_frames.modules, _frames.open, [(mode, mode.tally, mode.recomputing) for mode, _ in self.open])
        entered = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_patches)
            stack.enter_context(_eager())
            _frames.modules, _frames.open = list(self.modules), [mode for mode, _ in self.open]
            try:
                for mode, tally in self.open:
                    mode.tally, mode.recomputing = dict(tally), True
                    if not any(mode is other for other in entered):
                        stack.enter_context(mode)
                yield
            finally:
                _frames.modules, _frames.open = before[:2]
                for mode, tally, recomputing in before[2]:
                    mode.tally, mode.recomputing = tally, recomputing
