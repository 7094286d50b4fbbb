"""Where a kernel can run, and how its arguments cross to the extension."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

try:
    from dropscope import _core as _core
except ImportError as error:
    raise ImportError(
        f"dropscope's compiled kernels could not be loaded ({error}); build them with `pip install .`, "
        "or `pip install --no-build-isolation --editable .` in a working copy"
    ) from error

CPU, CUDA = 0, 1
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CODES = DTYPES | {torch.int32: 4}  # products of integers: one kernel meets them

MatrixArgument = tuple[int, int, int, int, int]


def isa() -> str:
    """The instruction set of the CPU kernels in use; the environment variable DROPSCOPE_ISA forces one."""
    return _core.isa()


def plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary strided tensors in memory that a kernel may read: not fake, functional or wrapped."""
    if torch.compiler.is_compiling():
        return False
    try:
        for x in tensors:
            # Parameter is the one subclass without behaviour of its own; wrapped tensors refuse data_ptr.
            if type(x) is not Tensor and type(x) is not nn.Parameter:
                return False
            if x.layout is not torch.strided or x.is_neg():
                return False
            x.data_ptr()
    except RuntimeError:
        return False
    return True


def device_of(*tensors: Tensor) -> int | None:
    """CPU or CUDA when a compiled kernel can serve these tensors, which share a device; None for the reference."""
    kind = tensors[0].device.type
    if any(x.device != tensors[0].device for x in tensors[1:]):
        return None
    if kind == "cpu":
        return CPU if plain(*tensors) else None
    if kind == "cuda" and _core.cuda_built():
        return CUDA if plain(*tensors) else None
    return None


def launch(device: int, x: Tensor) -> int:
    """The last argument of a kernel: torch's thread count on the CPU, its current stream on a device."""
    if device == CPU:
        return torch.get_num_threads()
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def on(device: int, x: Tensor) -> AbstractContextManager[object]:
    """Enter the tensor's device."""
    return nullcontext() if device == CPU else torch.cuda.device(x.device)


def matrix(x: Tensor) -> MatrixArgument:
    """A two-dimensional tensor with contiguous rows as (address, dtype, rows, cols, stride)."""
    rows, cols = x.shape
    return x.data_ptr(), _CODES[x.dtype], rows, cols, x.stride(0) if rows > 1 else cols


def contiguous_rows(x: Tensor) -> bool:
    """Whether the rows of a matrix are contiguous and do not overlap."""
    return (x.shape[1] <= 1 or x.stride(1) == 1) and (x.shape[0] <= 1 or x.stride(0) >= x.shape[1])
