"""The masked first operand of a layer: where draws share what no mask has met, its rows are remade and never stored.

Right after the first dropout the M draws of a sample differ by their masks only: a_im = x_i ∘ keep_im · 65536/T. What
is held is x, one row a sample, and one integer for each draw; a product makes a tile of rows, in cache, when it wants
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropscope.kernels.masks import apply_mask

__all__ = ["FirstOperand", "Masked", "same_rows", "whole"]


@dataclass(frozen=True, eq=False)
class Masked:
    """Rows a_i = x_{i // M} ∘ keep_i · 65536/threshold, for i = 0..N-1; keep_i has one unit for each entry of a row.

    Args:
        x: (N/M, T, d), floating point.
        streams: int64 (N,), draw << 32 | sample of each row.
        seed: 64-bit seed.
        site: 64-bit site.
        threshold: in 1..65535; the keep probability is threshold/65536.

    Raises:
        ValueError: x has no three dimensions, or its rows do not divide the streams.

    >>> operand = Masked(torch.ones(2, 1, 8), torch.arange(6), seed=0, site=0, threshold=32768)
    >>> operand.shape
    torch.Size([6, 1, 8])
    >>> operand.samples(0, 6).unique()
    tensor([0., 2.])
    """

    x: Tensor
    streams: Tensor
    seed: int
    site: int
    threshold: int

    def __post_init__(self) -> None:
        rows, streams = self.x.shape[0] if self.x.dim() else 0, len(self.streams)
        if self.x.dim() != 3:
            raise ValueError(f"Masked: x must have shape (rows, T, units), got {tuple(self.x.shape)}")
        if rows > streams or (streams and (rows == 0 or streams % rows)):
            raise ValueError(f"Masked: the rows of x must divide the {streams} streams, got {rows}")

    @property
    def shape(self) -> torch.Size:
        """(N, T, d)."""
        return torch.Size((len(self.streams), *self.x.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.x.device

    def samples(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows start..stop-1, (stop - start, T, d).

        Args:
            start: the first.
            stop: behind the last.
            out: contiguous memory for them, of the dtype that they shall have; a new tensor by default.
        """
        _, steps, units = self.x.shape
        rows = max(0, min(stop, len(self.streams)) - start)
        dtype = self.dtype if out is None else out.dtype
        if out is None:
            out = torch.empty(rows, steps, units, dtype=dtype, device=self.device)
        if rows and steps * units:
            group = len(self.streams) // len(self.x)
            x = self.x[start // group : -(-(start + rows) // group)]
            apply_mask(
                x.to(dtype).flatten(1),
                self.streams[start : start + rows],
                seed=self.seed,
                site=self.site,
                threshold=self.threshold,
                group=group,
                skip=start % group,
                out=out.view(rows, -1),
            )
        return out.view(rows, steps, units)

    @property
    def mask(self) -> tuple[int, int, int]:
        """Seed, site and threshold."""
        return self.seed, self.site, self.threshold


# What stands first in a layer, (N/M, T, d): a row serves M consecutive samples.
FirstOperand = Tensor | Masked


def whole(x: FirstOperand) -> Tensor:
    """All rows."""
    return x.samples(0, len(x.streams)) if isinstance(x, Masked) else x


def same_rows(x: FirstOperand, y: FirstOperand) -> bool:
    """Whether the two are the very same rows in memory, so that a matrix of their products is symmetric."""
    if isinstance(x, Masked):
        return isinstance(y, Masked) and x.mask == y.mask and same_rows(x.x, y.x) and same_rows(x.streams, y.streams)
    if isinstance(y, Masked):
        return False
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride())
