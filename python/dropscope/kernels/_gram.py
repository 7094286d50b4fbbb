"""Gram matrices of per-sample gradients from their factors: tile by tile, or by slabs of materialised gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dropscope.kernels import _tiles as tiles
from dropscope.kernels._launch import contiguous_rows
from dropscope.kernels._slabs import group_of, slabs
from dropscope.kernels.masked import FirstOperand, same_rows

# A, B and whether the bias's gradient counts.
Layer = tuple[FirstOperand, Tensor, bool]
L = TypeVar("L")


def add_gram(rows: Sequence[Layer], cols: Sequence[Layer], out: Tensor) -> None:
    """Layers by materialised gradients one by one, the others tile by tile together; checked arguments."""
    if not contiguous_rows(out):
        sums = out.contiguous()
        add_gram(rows, cols, sums)
        out.copy_(sums)
        return
    symmetric = all(same_rows(x[0], y[0]) and same_rows(x[1], y[1]) for x, y in zip(rows, cols, strict=True))
    pairs = list(zip(rows, cols, strict=True))
    ghost = [pair for pair in pairs if _ghost_is_cheaper(*pair[0][:2], *pair[1][:2])]
    if ghost:
        left, right = zip(*ghost, strict=True)
        add_tiles(left, right, out, symmetric, (_tile_size(left), _tile_size(right)), _Operand)
    for x, y in pairs:
        if not any(x is other for other, _ in ghost):
            _add_materialised(x, y, out, symmetric)


class Operand(Protocol):
    """A tile of samples of one layer."""

    def add_product(self, other: Any, out: Tensor, mirror: Tensor | None = None) -> None:
        """Add the Gram tile of the two to out, and its transpose to mirror."""


def add_tiles(
    rows: Sequence[L],
    cols: Sequence[L],
    out: Tensor,
    symmetric: bool,
    sizes: tuple[int, int],
    operand: Callable[[L, int, int], Operand],
) -> None:
    """Tiles of the Gram matrix, all layers of a tile while it is in cache.

    Args:
        rows: layers.
        cols: layers.
        out: contiguous rows; added to.
        symmetric: whether rows and cols are the same, so that half of the matrix is computed and mirrored.
        sizes: rows and columns of a tile.
        operand: (layer, start, size) -> tile of samples.
    """
    for i in range(0, out.shape[0], sizes[0]):
        left = [operand(x, i, sizes[0]) for x in rows]
        for j in range(0, i + 1 if symmetric else out.shape[1], sizes[1]):
            right = left if symmetric and i == j else [operand(y, j, sizes[1]) for y in cols]
            tile = out[i : i + sizes[0], j : j + sizes[1]]
            mirror = out[j : j + sizes[1], i : i + sizes[0]] if symmetric else None
            if len(rows) == 1:
                left[0].add_product(right[0], tile, mirror)
                continue
            total = torch.zeros_like(tile, memory_format=torch.contiguous_format)
            for x, y in zip(left, right, strict=True):
                x.add_product(y, total)
            tiles.add(total, tile, mirror)


def _add_materialised(rows: Layer, cols: Layer, out: Tensor, symmetric: bool) -> None:
    """Gradients of some output units at a time, each made once for the whole matrix."""
    step = tiles.gram_samples(rows[1])
    sides = [slabs(*rows, len(cols[1]))]
    if not symmetric:
        sides.append(slabs(*cols, len(rows[1])))
    for parts in zip(*sides, strict=True):
        left, right = parts[0], parts[-1]
        for i in range(0, len(left), step):
            for j in range(0, i + 1 if symmetric else len(right), step):
                to, at = slice(i, i + step), slice(j, j + step)
                Q = tiles.multiply(left[to], right[at].T)
                tiles.hadamard(None, Q, out[to, at], out[at, to] if symmetric else None)


def _tile_size(side: Sequence[Layer]) -> int:
    """Samples of a tile: so many rows of the longest product, and whole groups of every layer."""
    steps = max(B.shape[1] for _, B, _ in side)
    whole = math.lcm(*(group_of(*layer[:2]) for layer in side))
    return tiles.even_tile(side[0][1].shape[0], max(1, tiles.gram_samples(side[0][1]) // steps), whole)


class _Operand:
    """A tile of samples of one layer, as flat factors."""

    def __init__(self, layer: Layer, start: int, size: int) -> None:
        A, B, self.bias = layer
        self.group, self.steps = group_of(A, B), B.shape[1]
        dtype = tiles.product_dtype(A)
        self.a = tiles.packed(A, start // self.group, (start + size) // self.group, dtype)
        self.b = tiles.packed(B, start, start + size, dtype)

    def add_product(self, other: _Operand, out: Tensor, mirror: Tensor | None = None) -> None:
        """Add the Gram tile of the two to out, and its transpose to mirror."""
        P, Q = tiles.multiply(self.a, other.a.T), tiles.multiply(self.b, other.b.T)
        groups, steps = (self.group, other.group), (self.steps, other.steps)
        tiles.hadamard(P, Q, out, mirror, groups=groups, steps=steps, shift=float(self.bias))


def _ghost_is_cheaper(A: FirstOperand, B: Tensor, A2: FirstOperand, B2: Tensor) -> bool:
    """Flops a pair of samples of both routes, materialising each gradient once."""
    d_in, d_out, steps, steps2 = A.shape[2], B.shape[2], B.shape[1], B2.shape[1]
    ghost = steps * steps2 * (d_in / group_of(A, B) / group_of(A2, B2) + d_out)
    return ghost <= d_in * d_out * (1.0 + steps / B2.shape[0] + steps2 / B.shape[0])
