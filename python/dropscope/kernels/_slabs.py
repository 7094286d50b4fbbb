"""Materialised gradients of sequences, a few output units at a time: made once, they serve many vectors.

A gradient Σ_t b_t a_tᵀ costs T·d_in·d_out multiply-adds to make and d_in·d_out for each vector that it meets; from its
factors each vector costs T·d_in·d_out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dropscope.kernels import _tiles as tiles
from dropscope.kernels.masked import FirstOperand, Masked

# Bytes of the gradients of some output units, so that they stay near the processor; the units are a multiple of 16,
# as the registers of a matrix product want them.
_SLAB_BYTES, _FEWEST_UNITS = {"cpu": 24 << 20, "cuda": 256 << 20}, 16
# Output units of a slab where all samples do not fit.
_UNITS = 64
# Writing and reading an entry of a gradient, in multiply-adds: by the vectors from which slabs were faster on a CPU.
_PASS = 64


def group_of(A: FirstOperand, B: Tensor) -> int:
    """How many consecutive samples share a row of A."""
    return B.shape[0] // A.shape[0]


def pays(A: FirstOperand, B: Tensor, vectors: int) -> bool:
    """Whether materialised gradients cost fewer multiply-adds than the factors do, for so many vectors."""
    steps = A.shape[1]
    return group_of(A, B) * (steps + vectors + _PASS) < steps * vectors


def project(A: FirstOperand, B: Tensor, V: Tensor, out: Tensor) -> None:
    """out[i, k] += ⟨V_k, Σ_t b_it a_itᵀ⟩."""
    for a, b, rows in _samples(A, B):
        first = 0
        for slab in slabs(a, b, False, 0):
            units = slab.shape[1] // A.shape[2]
            part = V[:, first : first + units].to(slab.dtype).flatten(1)
            # With few rows first, the product would be half as fast.
            wide = len(slab) >= len(part)
            out[rows] += tiles.multiply(slab, part.T) if wide else tiles.multiply(part, slab.T).T
            first += units


def accumulate(A: FirstOperand, B: Tensor, S: Tensor, out: Tensor) -> None:
    """out[k] += Σ_i S[i, k] Σ_t b_it a_itᵀ."""
    for a, b, rows in _samples(A, B):
        weights, first = S[rows].T.contiguous(), 0
        for slab in slabs(a, b, False, 0):
            units = slab.shape[1] // A.shape[2]
            target = out[:, first : first + units]
            target += tiles.multiply(weights.to(slab.dtype), slab).view(target.shape)
            first += units


def _samples(A: FirstOperand, B: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Tiles of samples that share no row of A, and where they stand."""
    group, (_, units) = group_of(A, B), B.shape[1:]
    one = group * min(units, _UNITS) * A.shape[2] * tiles.product_dtype(A).itemsize
    size = tiles.even_tile(A.shape[0], max(1, _SLAB_BYTES[B.device.type] // one))
    for start in range(0, A.shape[0], size):
        rows = slice(start * group, min((start + size) * group, len(B)))
        yield A.samples(start, start + size) if isinstance(A, Masked) else A[start : start + size], B[rows], rows


def slabs(A: FirstOperand, B: Tensor, bias: bool, others: int) -> Iterator[Tensor]:
    """Gradients (n, units · d_in) of a few output units after the other, then the bias's; each gone with the next.

    The width of the slabs is that of the larger of the two sides, so that both have the same.
    """
    dtype = tiles.product_dtype(A)
    A, B = A if isinstance(A, Masked) else A.to(dtype), B.to(dtype)
    samples, steps, units = B.shape
    n, group, d_in = A.shape[0], group_of(A, B), A.shape[2]
    width = _SLAB_BYTES[B.device.type] // (max(samples, others) * d_in * dtype.itemsize)
    width = tiles.even_tile(units, max(1, width // _FEWEST_UNITS) * _FEWEST_UNITS, _FEWEST_UNITS)
    memory = torch.empty(samples * min(width, units) * d_in, dtype=dtype, device=B.device)
    for first in range(0, units, width):
        b = B[:, :, first : first + width]
        # The draws that share a row of A are more output units of it.
        b = b.mT if group == 1 else b.reshape(n, group, steps, -1).transpose(2, 3).reshape(n, -1, steps)
        slab = memory[: n * b.shape[1] * d_in].view(n, b.shape[1], d_in)
        yield _products(b, A, slab).view(samples, -1)
    if bias:
        yield B.sum(1)


def _products(b: Tensor, A: FirstOperand, out: Tensor) -> Tensor:
    """out[i] <- b_i A_i."""
    if not isinstance(A, Masked):
        return torch.bmm(b, A, out=out)
    samples, steps, units = A.shape
    size = max(1, tiles.tile_rows(units, out.itemsize, out.device) // steps)
    space = torch.empty(min(size, samples), steps, units, dtype=out.dtype, device=out.device)
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        torch.bmm(b[start:stop], A.samples(start, stop, space[: stop - start]), out=out[start:stop])
    return out
