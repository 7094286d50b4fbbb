"""The one TorchFunctionMode: hands torch functions to handlers, and knows the module that runs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dropscope.entry_points import here, patches, running

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
Handlers = Mapping[Callable[..., Any], Handler]


class Interceptor(TorchFunctionMode):
    """Hands each call of a torch function that has a handler to it, while entered.

    Args:
        handlers: what to do for each function, keyed by the function as torch passes it to function modes
            (``F.linear``, ``torch.Tensor.matmul``). A handler takes a :class:`Call` and returns the result, or
            ``NotImplemented`` to let the call through. It runs with the interceptor off.
        model: names the running modules; without it every path is empty.
    """

    def __init__(self, handlers: Handlers, model: nn.Module | None = None) -> None:
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
        for module, _ in running():
            name = self.names.get(id(module))
            if name is not None:
                return name
        return ""

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
        """Bind checkpoints, run compiled callables eagerly, switch on; inside itself, only switch on again."""
        with contextlib.ExitStack() as stack:
            if not any(self is mode for mode in here.modes):
                stack.enter_context(patches)
                here.modes.append(self)
                stack.callback(here.modes.remove, self)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._entered.pop().close()


def chained(*tables: Handlers) -> dict[Callable[..., Any], Handler]:
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
