"""Row tiles of torch's products with our passes around them, on plain CPU tensors of the factors' dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from dropscope.kernels._launch import CPU, DTYPES, MatrixArgument, _core, contiguous_rows, matrix
from dropscope.kernels.products import add_product as add_product
from dropscope.kernels.products import multiply as multiply
from dropscope.kernels.products import multiply_into, native_bfloat16

FACTOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SUM_DTYPES = (torch.float32, torch.float64)
_TILE_BYTES = 4 << 20
_NOTHING: MatrixArgument = (0, 0, 0, 0, 0)


def flat_rows(x: Tensor) -> Tensor:
    """(n, T, d) as (n·T, d) with contiguous rows; a copy only where the strides demand it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if contiguous_rows(rows) else rows.contiguous()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that factors are multiplied in: bfloat16 in float32, tile by tile in cache, where the CPU has no units."""
    return torch.float32 if dtype == torch.bfloat16 and not native_bfloat16() else dtype


class Workspace:
    """Memory that products of tiles share: fresh memory for each would cost its page faults again."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(elements, dtype=dtype)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product a b, gone when the next is made."""
        return multiply_into(a, b, self.take(len(a), b.shape[1]))

    def take(self, rows: int, cols: int) -> Tensor:
        """A matrix of arbitrary contents in the workspace."""
        return self.memory[: rows * cols].view(rows, cols)


def tile_rows(width: int, itemsize: int, multiple: int = 1) -> int:
    """Rows of a tile of this width that stays in cache: at most 2048, at least 256, a multiple of ``multiple``."""
    rows = min(2048, max(256, _TILE_BYTES // max(1, width * itemsize)))
    return max(1, rows // multiple) * multiple


def even_tile(total: int, largest: int, multiple: int = 1) -> int:
    """The size at most about ``largest`` that cuts ``total`` evenly, so that products of few shapes are needed."""
    pieces = max(1, -(-total // largest))
    return -(-total // (pieces * multiple)) * multiple


def row_dots(P: Tensor, B: Tensor, out: Tensor, group: int = 1, steps: int = 1) -> None:
    """out[i, k] += Σ_t ⟨P[(i // group)·steps + t, block k], B[i·steps + t]⟩, summed in float64."""
    _core.row_dots(CPU, matrix(P), matrix(B), matrix(out), group, steps, torch.get_num_threads())


def scale_rows(B: Tensor, S: Tensor, out: Tensor, group: int = 1, steps: int = 1) -> Tensor:
    """out[i·steps + t, block k] = Σ_{m < group} S[i·group + m, k] B[(i·group + m)·steps + t]; out may be wider."""
    _core.scale_rows(CPU, matrix(B), matrix(S), matrix(out), group, steps, torch.get_num_threads())
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
) -> None:
    """out[i, j] += Σ_ts (P + shift) Q over the block (i, j), and mirror[j, i] likewise; P None stands for 1."""
    _core.hadamard(
        CPU,
        _NOTHING if P is None else matrix(P),
        matrix(Q),
        matrix(out),
        _NOTHING if mirror is None else matrix(mirror),
        *groups,
        *steps,
        shift,
        torch.get_num_threads(),
    )


def add(total: Tensor, out: Tensor, mirror: Tensor | None = None) -> None:
    """out += total, and mirror += totalᵀ."""
    if mirror is None:
        out += total
    else:
        hadamard(None, total, out, mirror)


def center_rows(X: Tensor, draws: int, scale: float) -> None:
    """X[i·draws + m] ← scale (X[i·draws + m] − mean over m), in place."""
    _core.center(CPU, matrix(X), draws, scale, torch.get_num_threads())


__all__ = [
    "DTYPES",
    "FACTOR_DTYPES",
    "SUM_DTYPES",
    "Workspace",
    "add",
    "add_product",
    "center_rows",
    "even_tile",
    "flat_rows",
    "hadamard",
    "multiply",
    "product_dtype",
    "row_dots",
    "scale_rows",
    "tile_rows",
]
