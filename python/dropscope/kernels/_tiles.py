"""Row tiles of torch's products with our passes around them, on plain tensors of the factors' dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dropscope.kernels._launch import CPU, CUDA, DTYPES, MatrixArgument, _core, contiguous_rows, launch, matrix, on
from dropscope.kernels.masked import FirstOperand, Masked
from dropscope.kernels.products import add_product as add_product
from dropscope.kernels.products import adds_in_place as adds_in_place
from dropscope.kernels.products import multiply as multiply
from dropscope.kernels.products import multiply_into, native_bfloat16, prefer_onednn

FACTOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SUM_DTYPES = (torch.float32, torch.float64)
# Bytes and rows of a product that stays in cache, and samples of a side of a Gram tile. A device's second cache holds
# tens of megabytes, and its products need large shapes.
_TILE_BYTES, _TILE_ROWS, _GRAM_SAMPLES = (
    {"cpu": 4 << 20, "cuda": 32 << 20},
    {"cpu": 1 << 14, "cuda": 1 << 16},
    {"cpu": 512, "cuda": 2048},
)
# Bytes that stay in the cache of one core.
_CORE_BYTES = 1 << 20
# Numbers that the threads may hold together, each summing for itself: they are written and read besides the products.
_SMALL_SUMS = 1 << 21
_NOTHING: MatrixArgument = (0, 0, 0, 0, 0)


def flat_rows(x: Tensor) -> Tensor:
    """(n, T, d) as (n·T, d) with contiguous rows; a copy only where the strides demand it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if contiguous_rows(rows) else rows.contiguous()


def product_dtype(x: FirstOperand) -> torch.dtype:
    """Dtype that factors are multiplied in: bfloat16 in float32, tile by tile in cache, where the CPU has no units."""
    return torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not native_bfloat16() else x.dtype


class Workspace:
    """Memory that products of tiles share: fresh memory for each would cost its page faults again."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(elements, dtype=dtype, device=device)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product a b, gone when the next is made."""
        return multiply_into(a, b, self.take(len(a), b.shape[1]))

    def take(self, rows: int, cols: int) -> Tensor:
        """A matrix of arbitrary contents in the workspace."""
        return self.memory[: rows * cols].view(rows, cols)


def packing_space(x: FirstOperand, samples: int, dtype: torch.dtype) -> Workspace | None:
    """Memory for tiles of so many samples of a masked operand; other operands need none."""
    if not isinstance(x, Masked):
        return None
    count, steps, units = x.shape
    return Workspace(min(samples, count) * steps * units, dtype, x.device)


def packed(x: FirstOperand, start: int, stop: int, dtype: torch.dtype, space: Workspace | None = None) -> Tensor:
    """Samples start..stop-1 as flat rows of this dtype; masked ones are made, in ``space`` if given."""
    if not isinstance(x, Masked):
        return flat_rows(x[start:stop]).to(dtype)
    count, steps, units = x.shape
    rows = max(0, min(stop, count) - start) * steps
    out = space.take(rows, units) if space else torch.empty(rows, units, dtype=dtype, device=x.device)
    x.samples(start, stop, out)
    return out


class Sum:
    """out += Σ aᵀb over tiles. Where out is small, each thread sums the products of its own share of every tile.

    One product of few rows divides badly: the threads pack the same numbers, each for itself.
    """

    def __init__(self, out: Tensor, dtype: torch.dtype) -> None:
        self.out, threads = out, torch.get_num_threads()
        apart = threads > 1 and out.is_cpu and threads * out.numel() <= _SMALL_SUMS and out.dtype == dtype
        self.parts = out.new_zeros(threads, *out.shape) if apart and not prefer_onednn() else None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add aᵀb; out has it after :meth:`finish`."""
        shared = 0
        if self.parts is not None and (share := len(a) // len(self.parts)):
            shared = share * len(self.parts)
            mine, others = (x[:shared].view(-1, share, x.shape[1]) for x in (a, b))
            self.parts.baddbmm_(mine.mT, others)
        if shared < len(a):
            add_product(self.out, a[shared:].T, b[shared:])

    def finish(self) -> None:
        """Add what the threads have summed."""
        for part in () if self.parts is None else self.parts:
            self.out += part


def tile_rows(width: int, itemsize: int, device: torch.device, *, near: bool = False) -> int:
    """Rows of a tile of this width, at least 256, that stays in the device's cache, or ``near``, in its cores' own."""
    most = _TILE_BYTES[device.type]
    if near and device.type == "cpu":
        most = min(most, _CORE_BYTES * torch.get_num_threads())
    return min(_TILE_ROWS[device.type], max(256, most // max(1, width * itemsize)))


def gram_samples(like: Tensor) -> int:
    """Rows of a side of a Gram tile on the device of ``like``."""
    return _GRAM_SAMPLES[like.device.type]


def even_tile(total: int, largest: int, multiple: int = 1) -> int:
    """The size at most about ``largest`` that cuts ``total`` evenly, so that products of few shapes are needed."""
    pieces = max(1, -(-total // largest))
    return -(-total // (pieces * multiple)) * multiple


def _run(kernel: Callable[..., None], x: Tensor, *arguments: object) -> None:
    """Call a kernel on the device of x."""
    device = CUDA if x.is_cuda else CPU
    with on(device, x):
        kernel(device, *arguments, launch(device, x))


def row_dots(P: Tensor, B: Tensor, out: Tensor, group: int = 1, steps: int = 1) -> None:
    """out[i, k] += Σ_t ⟨P[(i // group)·steps + t, block k], B[i·steps + t]⟩, summed in float64."""
    _run(_core.row_dots, out, matrix(P), matrix(B), matrix(out), group, steps)


def scale_rows(B: Tensor, S: Tensor, out: Tensor, group: int = 1, steps: int = 1) -> Tensor:
    """out[i·steps + t, block k] = Σ_{m < group} S[i·group + m, k] B[(i·group + m)·steps + t]; out may be wider."""
    _run(_core.scale_rows, out, matrix(B), matrix(S), matrix(out), group, steps)
    return out


def hadamard(
    P: Tensor | None,
    Q: Tensor,
    out: Tensor,
    mirror: Tensor | None = None,
    *,
    groups: tuple[int, int] = (1, 1),
    steps: tuple[int, int] = (1, 1),
    shift: float = 0.0,
    scales: Sequence[Tensor] = (),
) -> None:
    """out[i, j] += Σ_ts (P + shift) Q over the block (i, j), and mirror[j, i] likewise; P None stands for 1.

    ``scales``: float32 vectors for the rows and columns of P and the rows and columns of Q, which may then be int32.
    """
    _run(
        _core.hadamard,
        out,
        _NOTHING if P is None else matrix(P),
        matrix(Q),
        matrix(out),
        _NOTHING if mirror is None else matrix(mirror),
        *groups,
        *steps,
        shift,
        tuple(matrix(scale.unsqueeze(0)) for scale in scales),
    )


def add(total: Tensor, out: Tensor, mirror: Tensor | None = None) -> None:
    """out += total, and mirror += totalᵀ."""
    if mirror is None:
        out += total
    else:
        hadamard(None, total, out, mirror)


def center_rows(X: Tensor, draws: int, scale: float) -> None:
    """X[i·draws + m] ← scale (X[i·draws + m] − mean over m), in place."""
    _run(_core.center, X, matrix(X), draws, scale)


__all__ = [
    "DTYPES",
    "FACTOR_DTYPES",
    "SUM_DTYPES",
    "Sum",
    "Workspace",
    "add",
    "add_product",
    "adds_in_place",
    "center_rows",
    "even_tile",
    "flat_rows",
    "gram_samples",
    "hadamard",
    "multiply",
    "packed",
    "packing_space",
    "product_dtype",
    "row_dots",
    "scale_rows",
    "tile_rows",
]
