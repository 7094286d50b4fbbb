"""Float32 matrix products by the faster of the two libraries that torch carries on the CPU."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Multiply-adds from which a product gains by it; below, the call costs more than it saves.
_SMALLEST = 1 << 16
# Multiply-adds of a computation from which the detour of its every operation through Python is paid for.
_WORTHWHILE = 1 << 26


@functools.cache
def prefer_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than the BLAS of torch.mm.

    MKL keeps its AVX-512 code to Intel's CPUs; elsewhere oneDNN's runs 2.2 times faster, at the same precision.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return "GenuineIntel" not in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a b."""
    if a.dtype == torch.float32 and a.numel() and b.numel() and prefer_onednn():
        return _onednn(a, b)
    return torch.mm(a, b)


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
