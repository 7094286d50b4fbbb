"""The Gram matrix of the rows of dropout noise, centred within samples, tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.factors.blocks import Block, FactorBlock
from dropscope.factors.chunk import Chunk
from dropscope.kernels.products import multiply

Precision = Literal["full", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("full", "bf16", "int8")
# Rows and columns of a tile of the Gram matrix.
_TILE = 2048


class CentredGram:
    """DCGGᵀD of all rows, tile by tile on and below the diagonal; C subtracts each sample's mean over its draws.

    Centred before it is stored, so that rounding to bfloat16 acts on the noise and not on the mean gradient beside it.

    Attributes:
        segments: rows of equal numbers of draws, that number, and their (M-1)^-½.
    """

    def __init__(self, chunks: Sequence[Chunk], dtype: torch.dtype, precision: Precision = "full") -> None:
        pieces = [piece for chunk in chunks for piece in pieces_of(chunk)]
        ends = list(itertools.accumulate(piece.rows for piece in pieces))
        self.segments = [
            (slice(end - piece.rows, end), piece.draws, (piece.draws - 1) ** -0.5)
            for end, piece in zip(ends, pieces, strict=True)
        ]
        self.rows, self.dtype, self.rank = ends[-1], dtype, sum(piece.rows - piece.samples for piece in pieces)
        self.device = next(iter(pieces[0].blocks[0].tensors().values())).device
        layers = [_layers(piece, precision) for piece in pieces]
        storage = torch.bfloat16 if precision == "bf16" else dtype
        self.tiles: dict[tuple[int, int], Tensor] = {}
        for j, i in itertools.combinations_with_replacement(range(len(pieces)), 2):
            tile = torch.zeros(pieces[i].rows, pieces[j].rows, dtype=dtype, device=self.device)
            kernels.gram_sum(layers[i].plain, layers[j].plain, tile)
            kernels.gram_rounded(layers[i].rounded, layers[j].rounded, tile)
            for mine, other in zip(pieces[i].blocks, pieces[j].blocks, strict=True):
                if not isinstance(mine, FactorBlock):
                    mine.add_gram(other, tile)
            weight = self.segments[i][2] * self.segments[j][2]
            self.tiles[i, j] = kernels.center(tile, pieces[i].draws, weight).to(storage)

    def center(self, X: Tensor) -> Tensor:
        """CX, in place."""
        for rows, draws, _ in self.segments:
            kernels.center(X[rows], draws)
        return X

    def product(self, X: Tensor) -> Tensor:
        """DCGGᵀCDX for contrasts X, CX = X."""
        out = torch.zeros_like(X)
        for (i, j), stored in self.tiles.items():
            tile = stored.to(self.dtype)
            rows, cols = self.segments[i][0], self.segments[j][0]
            out[rows] += multiply(tile, X[cols])
            if i != j:
                out[cols] += multiply(X[rows].T, tile).T
        return self.center(out)


def pieces_of(chunk: Chunk) -> list[Chunk]:
    """The chunk cut between samples, evenly, into pieces of about _TILE rows."""
    count = -(-chunk.rows // _TILE)
    if count == 1:
        return [chunk]
    size = -(-chunk.samples // count)
    return [
        Chunk(
            chunk.ids[i : i + size],
            chunk.draws,
            tuple(samples_of(b, chunk.samples, slice(i, i + size)) for b in chunk.blocks),
        )
        for i in range(0, chunk.samples, size)
    ]


def samples_of(block: Block, samples: int, chosen: slice | Tensor) -> Block:
    """The rows of some of the block's samples."""
    parts = {name: t.view(samples, -1, *t.shape[1:])[chosen].flatten(0, 1) for name, t in block.tensors().items()}
    return block.replace(parts)


class _Layers(NamedTuple):
    """Factors of a piece as the Gram kernels take them."""

    plain: list[tuple[kernels.FirstOperand, Tensor, bool]]
    rounded: list[tuple[kernels.Rounded, kernels.Rounded, bool]]


def _layers(chunk: Chunk, precision: Precision) -> _Layers:
    layers = _Layers([], [])
    for b in chunk.blocks:
        if not isinstance(b, FactorBlock):
            continue
        if precision == "int8" and b.B.shape[1] == 1:
            A = kernels.round_rows(b.A if isinstance(b.A, kernels.Masked) else b.A.squeeze(1))
            B = kernels.round_rows(b.B.squeeze(1))
            layers.rounded.append((A, B, b.bias is not None))
        else:
            layers.plain.append((b.A, b.B, b.bias is not None))
    return layers
