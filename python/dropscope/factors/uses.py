"""What a call that consumed parameters leaves behind: its input, the edge of its output, and its per-row gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dropscope.kernels import FirstOperand, Masked

Layout = Literal["rows", "time"]
LAYOUTS: tuple[Layout, ...] = ("rows", "time")


class Factors(NamedTuple):
    """Per-row gradients Σ_t b_t a_tᵀ of a (d_out, d_in) weight.

    A: (N, T, d_in), or (N/M, T, d_in) when the M draws of a sample share it, or masked rows of what they share.
    B: (N, T, d_out).
    """

    A: FirstOperand
    B: Tensor


class Dropped:
    """A mask just made on what all draws of a sample share.

    Args:
        x: what was masked.
        out: what came out.
        mask: streams, seed, site, threshold.
        draws: of each sample.
    """

    def __init__(self, x: Tensor, out: Tensor, mask: tuple[Tensor, int, int, int], draws: int) -> None:
        self.x, self.out, self.mask, self.draws = x.detach(), out.detach(), mask, draws
        self.versions = x._version, out._version
        self.rows: Tensor | None = None

    def operand(self, x: Tensor) -> Masked | None:
        """The operand of a layer whose input is what came out, perhaps in another shape; None if it is not."""
        same = x.data_ptr() == self.out.data_ptr() and x.numel() == self.out.numel()
        if not same or not x.numel() or not (x.is_contiguous() and self.out.is_contiguous()):
            return None
        if self.rows is None and (self.x._version, self.out._version) == self.versions:
            # A copy: what was masked may be changed in place later.
            rows = self.x.reshape(len(self.mask[0]), -1)[:: self.draws]
            self.rows = rows.clone(memory_format=torch.contiguous_format)
        if self.rows is None or self.out._version != self.versions[1] or self.rows.shape[1] % x.shape[-1]:
            return None
        return Masked(self.rows.view(len(self.rows), -1, x.shape[-1]), *self.mask)


class UnfitError(Exception):
    """A use of a parameter that has no row per sample and draw; carries the reason."""


@dataclass
class Use:
    """One call that consumed parameters.

    Attributes:
        weight: name of the weight, or None if it is not captured here.
        bias: name of the bias, or None.
        edge: where in the graph the gradient b of the output appears.
        inputs: what the weight met; one row per sample where its draws had bit-equal inputs; :class:`Masked` right
            after the first dropout.
        weight_part: (inputs, b, rows, layout) -> Factors or (rows, numel) gradients.
        bias_part: (b, rows, layout) -> (rows, numel) gradients.
        paired: the bias gradient is Σ_t of the weight's factor B.
        dtype: of the output, which autocast may have made shorter than the parameters'.
    """

    weight: str | None
    bias: str | None
    edge: GradientEdge
    inputs: FirstOperand
    weight_part: Callable[[Any, Tensor, int, Layout], Factors | Tensor]
    bias_part: Callable[[Tensor, int, Layout], Tensor]
    paired: bool
    dtype: torch.dtype


def by_rows(x: Tensor, rows: int, layout: Layout) -> Tensor:
    """View (..., d) as (rows, T, d), the row being the first axis (or its slow part), or the last but one.

    Raises:
        UnfitError: if the axis is no multiple of the number of rows.
    """
    width = x.shape[-1]
    if layout == "rows":
        if x.ndim < 2 or x.shape[0] % rows:
            raise UnfitError(f"a tensor of shape {tuple(x.shape)} has no axis of {rows} rows")
        return x.reshape(rows, -1, width)
    time_major = x.transpose(0, 1) if x.ndim == 3 and x.shape[1] == rows else None
    if time_major is None and x.ndim == 2 and x.shape[0] % rows == 0:
        time_major = x.reshape(-1, rows, width).transpose(0, 1)
    if time_major is None:
        raise UnfitError(f"a tensor of shape {tuple(x.shape)} has no second axis of {rows} rows")
    return time_major.reshape(rows, -1, width)


def last_axis_bias(b: Tensor, rows: int, layout: Layout) -> Tensor:
    """Σ_t b_t."""
    return by_rows(b, rows, layout).sum(1)


def channel_bias(b: Tensor, rows: int, layout: Layout) -> Tensor:  # noqa: ARG001
    """Σ over positions of (rows, channels, ...)."""
    return b.reshape(rows, b.shape[1], -1).sum(2)
