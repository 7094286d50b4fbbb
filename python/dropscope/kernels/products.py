"""Float32 matrix products by the faster of the two libraries that torch carries on the CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Multiply-adds from which a product gains by it; below, the call costs more than it saves.
_SMALLEST = 1 << 16
# Multiply-adds of a computation from which the detour of its every operation through Python is paid for.
_WORTHWHILE = 1 << 26
# How much faster another product must be before it is taken. Where it matters it is 2 times (oneDNN where MKL keeps its
# AVX-512 code to Intel's CPUs) or more (bfloat16 units), so that a busy machine does not change what is measured.
CLEARLY = 1.4


@functools.cache
def prefer_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices clearly faster than the BLAS of torch.mm, by a trial of some 10 ms."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    a, b = _trial(torch.float32)
    return CLEARLY * fastest(lambda: _onednn(a, b)) < fastest(lambda: torch.mm(a, b))


@functools.cache
def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices clearly faster than float32 ones, by a trial of some 10 ms."""
    a, b = _trial(torch.bfloat16)
    c, d = _trial(torch.float32)
    return CLEARLY * fastest(lambda: torch.mm(a, b)) < fastest(lambda: multiply(c, d))


def _trial(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices of the sizes of our tiles, without drawing from torch's generator."""
    with _disable_current_modes():
        return torch.full((256, 256), 0.5, dtype=dtype), torch.full((256, 512), 0.5, dtype=dtype)


@torch.no_grad()
def fastest(product: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of a few calls, the first not counted."""
    with _disable_current_modes():  # which would add their own time, or count the trial's memory as someone else's
        product()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a b."""
    if _takes_onednn(a, b):
        return _onednn(a, b)
    return torch.mm(a, b)


def multiply_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The matrix product a b in the memory of out, or elsewhere where that is faster."""
    if _takes_onednn(a, b):
        return _onednn(a, b)
    return torch.mm(a, b, out=out)


def adds_in_place(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether :func:`add_product` is one call, which also scales at no cost."""
    return out.dtype == a.dtype and not _takes_onednn(a, b)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """out += scale a b."""
    if adds_in_place(out, a, b):
        out.addmm_(a, b, alpha=scale)
    else:
        out.add_(multiply(a, b), alpha=scale)


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return a.is_cpu and a.dtype == torch.float32 and min(a.numel(), b.numel()) > 0 and prefer_onednn()


def faster_products(work: float) -> AbstractContextManager[object]:
    """A context in which torch's own products of float32 CPU matrices, those of autograd too, take the faster library.

    Args:
        work: multiply-adds of what runs inside, roughly; little work is left alone.
    """
    return _FasterProducts() if work >= _WORTHWHILE and prefer_onednn() else nullcontext()  # type: ignore[no-untyped-call]


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # for a part of a wider matrix oneDNN has plain loops only, a thousand times slower
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return product


def _fits(a: Tensor, b: Tensor, *others: Tensor) -> bool:
    for x in (a, b, *others):
        if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or x.layout != torch.strided:
            return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= _SMALLEST


class _FasterProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations below autograd, so that derivatives are those of the original products."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not kwargs:
            if func is torch.ops.aten.mm.default and _fits(*args):
                return _onednn(*args)
            if func is torch.ops.aten.addmm.default and args[0].dim() == 1 and _fits(*args[1:], args[0]):
                return _onednn(args[1], args[2], args[0])
        return func(*args, **(kwargs or {}))
