"""Gram matrices of per-sample gradients from factors rounded to 8-bit integers.

A row x becomes s·q, q integers in [-127, 127] and s = max|x|/127: every entry is off by at most s/2, independently of
the others, so that an inner product of d entries is off by some 10⁻²/√d of the product of the norms. Integer products
are exact. CPUs with units for them (VNNI, AMX) make them four times faster than float32 ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropscope.kernels import _tiles as tiles
from dropscope.kernels._gram import Layer, add_tiles
from dropscope.kernels._launch import CPU, device_of
from dropscope.kernels.factors import gram_sum
from dropscope.kernels.masked import FirstOperand, Masked
from dropscope.kernels.products import CLEARLY, fastest, multiply

__all__ = ["Rounded", "gram_rounded", "native_int8", "round_rows"]

_LARGEST = 127
# Rows below this are zeros: their squares underflow.
_SMALLEST = 1e-30
# Rows that are rounded while they stay in cache.
_ROWS = 512
# An inner product of so many entries fits 32 bits.
_MOST_ENTRIES = (2**31 - 1) // _LARGEST**2


class Rounded(NamedTuple):
    """Rows scales[r]·values[r].

    values: int8 (n, d), in [-127, 127]. scales: float32 (n,).
    """

    values: Tensor
    scales: Tensor


# A (N/M, d_in), B (N, d_out) and whether the bias's gradient counts.
RoundedLayer = tuple[Rounded, Rounded, bool]


@functools.cache
def native_int8() -> bool:
    """Whether the CPU multiplies 8-bit integers exactly and clearly faster than float32, by a trial of some 10 ms."""
    if not hasattr(torch, "_int_mm"):
        return False
    # 257 is odd, and the sums of 127² do not fit 16 bits: instructions that saturate on the way are found out.
    a = torch.full((256, 512), _LARGEST, dtype=torch.int8)
    b = torch.where(torch.arange(257) % 2 == 0, _LARGEST, -_LARGEST).to(torch.int8).unsqueeze(1).expand(-1, 512)
    b, c, d = b.contiguous(), torch.ones(256, 512), torch.ones(257, 512)
    try:
        product = torch._int_mm(a, b.T)
    except RuntimeError:
        return False
    exact = torch.equal(product.double(), a.double() @ b.double().T)
    return exact and CLEARLY * fastest(lambda: torch._int_mm(a, b.T)) < fastest(lambda: multiply(c, d.T))


@torch.no_grad()
def round_rows(x: FirstOperand) -> Rounded:
    """Round every row to integers, to nearest even; a row of zeros stays one.

    Args:
        x: (n, d), floating point, finite; or masked rows of one time step, never all made at once.

    Raises:
        TypeError: x is not floating point.
        ValueError: x is not a matrix, not finite, or its rows are so long that sums of products do not fit 32 bits.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"round_rows: x must be floating point, got {x.dtype}")
    shape = (x.shape[0], x.shape[2]) if isinstance(x, Masked) and x.shape[1] == 1 else x.shape
    if len(shape) != 2 or shape[1] > _MOST_ENTRIES:
        raise ValueError(f"round_rows: x must have shape (n, d), d at most {_MOST_ENTRIES}, got {tuple(x.shape)}")
    values = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, shape[0], _ROWS):
        part = tiles.packed(x, start, start + _ROWS, torch.float32)
        largest = part.abs().amax(1)
        largest.masked_fill_(largest < _SMALLEST, 0.0)
        scales[start : start + _ROWS] = largest / _LARGEST
        inverse = torch.where(largest > 0, _LARGEST / largest, 0.0)
        values[start : start + _ROWS] = (part * inverse.unsqueeze(1)).round_()
    if not bool(torch.isfinite(scales.sum())):
        raise ValueError("round_rows: x must be finite, got NaN or Inf")
    return Rounded(values, scales)


@torch.no_grad()
def gram_rounded(rows: Sequence[RoundedLayer], cols: Sequence[RoundedLayer], out: Tensor) -> None:
    """:func:`gram_sum` of layers of one time step whose factors are rounded: out[i, j] += Σ_layers ⟨g_i, g'_j⟩.

    Args:
        rows: (A, B, bias) of each layer: A (N/M, d_in), each row shared by M consecutive samples, B (N, d_out).
        cols: (A2, B2, bias) of each layer; the very same tensors as ``rows`` for a symmetric matrix.
        out: (N, N'), float32 or float64, contiguous rows; added to.

    Raises:
        ValueError: shapes disagree.
    """
    _check(rows, cols, out)
    if out.numel() == 0 or not rows:
        return
    if device_of(out, *(x for layer in (*rows, *cols) for part in layer[:2] for x in part)) != CPU:
        gram_sum([_widened(*layer) for layer in rows], [_widened(*layer) for layer in cols], out)
        return
    symmetric = all(x[0].values is y[0].values and x[1].values is y[1].values for x, y in zip(rows, cols, strict=True))
    add_tiles(rows, cols, out, symmetric, (_tile_size(rows, out), _tile_size(cols, out)), _Operand)


def _check(rows: Sequence[RoundedLayer], cols: Sequence[RoundedLayer], out: Tensor) -> None:
    left, right = ([(*A.values.shape, *B.values.shape) for A, B, _ in side] for side in (rows, cols))
    fits = [(a[1], a[3]) for a in left] == [(b[1], b[3]) for b in right]
    for side, samples in zip((left, right), out.shape, strict=True):
        fits = fits and all(samples == N and n > 0 and N % n == 0 for n, _, N, _ in side)
    if not fits:
        raise ValueError(f"gram_rounded: layers must fit each other and out {tuple(out.shape)}, got {left} and {right}")


def _widened(A: Rounded, B: Rounded, bias: bool) -> Layer:
    a, b = (x.values * x.scales.unsqueeze(1) for x in (A, B))
    return a.unsqueeze(1), b.unsqueeze(1), bias


def _tile_size(side: Sequence[RoundedLayer], out: Tensor) -> int:
    samples = len(side[0][1].values)
    whole = math.lcm(*(samples // len(A.values) for A, _, _ in side))
    return tiles.even_tile(samples, tiles.gram_samples(out), whole)


class _Operand:
    """A tile of samples of one layer."""

    def __init__(self, layer: RoundedLayer, start: int, size: int) -> None:
        A, B, self.bias = layer
        self.group = len(B.values) // len(A.values)
        held = slice(start // self.group, (start + size) // self.group)
        self.a, self.b = Rounded(*(x[held] for x in A)), Rounded(*(x[start : start + size] for x in B))

    def add_product(self, other: _Operand, out: Tensor, mirror: Tensor | None = None) -> None:
        """Add the Gram tile of the two to out, and its transpose to mirror."""
        P, Q = (_multiply(x.values, y.values) for x, y in ((self.a, other.a), (self.b, other.b)))
        scales = (self.a.scales, other.a.scales, self.b.scales, other.b.scales)
        tiles.hadamard(P, Q, out, mirror, groups=(self.group, other.group), shift=float(self.bias), scales=scales)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The integers a bᵀ, in float32 where the CPU has no units for them."""
    if native_int8() and a.shape[1] > 1:  # of single entries torch 2.13 makes other products
        return torch._int_mm(a, b.T)
    return multiply(a.float(), b.float().T)
