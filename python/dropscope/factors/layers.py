"""One rule per function that consumes a parameter: how its output gradient becomes a per-sample gradient.

A rule runs the function with its parameters detached, so that no weight gradient is computed, and records the input
and the graph edge of the output. Once the gradient b of that output is known, the gradient of row r is Σ_t b_rt a_rtᵀ:
the :class:`Factors`. Rules assume nothing about which axis is the sample; the capture tries the layouts and checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.factors.uses import Factors, Layout, UnfitError, by_rows, channel_bias
from dropscope.factors.windows import Window
from dropscope.kernels import FirstOperand, Masked

if TYPE_CHECKING:
    from dropscope.factors.recorder import Recorder

# Numbers of a row's gradient above which an embedding takes another route. A row's, so that a trial on a few rows and
# passes of many decide alike.
MOST_NUMBERS = 1 << 22


def _linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    return recorder.run(input, weight, bias, F.linear, _linear_factors, paired=True, shareable=True, maskable=True)


def _linear_factors(x: FirstOperand, b: Tensor, rows: int, layout: Layout) -> Factors:
    if isinstance(x, Masked):
        if layout != "rows":
            raise UnfitError("masked rows are rows of the batch")
        return Factors(x, by_rows(b, rows, layout))
    return Factors(by_rows(x, rows * x.shape[0] // b.shape[0], layout), by_rows(b, rows, layout))


def _addmm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1 or recorder.captures(mat1):
        return NotImplemented
    function = torch.addmm  # whose bias comes first
    run: Any = lambda x, w, b: function(b, x, w)  # noqa: E731
    return recorder.run(mat1, mat2, input, run, _swapped)


def _matmul(recorder: Recorder, input: Tensor, other: Tensor) -> Any:  # noqa: A002
    if other.ndim != 2 or recorder.captures(input):
        return NotImplemented
    return recorder.run(input, other, None, lambda x, w, _: torch.matmul(x, w), _swapped)


def _conv(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if input.ndim != weight.ndim:
        return NotImplemented
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    window = Window.of(weight, stride, padding, dilation, groups)

    def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors | Tensor:
        if layout != "rows" or b.shape[0] != rows:
            raise UnfitError(f"a convolution of {b.shape[0]} images has no row for each of {rows}")
        patches = window.patches(x)
        if groups == 1:
            return Factors(patches[:, 0].mT, b.flatten(2).mT)
        parts = b.reshape(rows, groups, b.shape[1] // groups, -1)
        return (parts @ patches.repeat_interleave(rows // len(x), 0).mT).flatten(1)

    return recorder.run(
        input,
        weight,
        bias,
        lambda x, w, b: function(x, w, b, stride, padding, dilation, groups),
        weight_part,
        channel_bias,
        paired=groups == 1,
        shareable=True,
    )


def _embedding(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented

    def weight_part(_: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors | Tensor:
        return embedded(input, b, weight, padding_idx, rows, layout)

    def lookup(w: Tensor) -> Tensor:
        return F.embedding(input, w, padding_idx)

    if input.ndim == 2 and input.shape[0] == 1 < recorder.rows:
        # Positions, looked up once for all rows: each row has its gradient where they are added to it.
        return recorder.postpone(weight, lookup, weight_part)
    return recorder.run(input, weight, None, lambda _, w, __: lookup(w), weight_part, keep=False)


def embedded(
    ids: Tensor, b: Tensor, weight: Tensor, padding_idx: int | None, rows: int, layout: Layout
) -> Factors | Tensor:
    """Gradients of a table, from those of its rows that were looked up: the smaller of factors and sums.

    Args:
        ids: (rows, ...) or, for all rows alike, (1, ...).
        b: (*ids.shape, d).
        weight: the table, (size, d).
        padding_idx: an id without a gradient.
        rows: samples times draws.
        layout: which axis is the row.

    Returns:
        Factors, or (rows, size · d).

    Raises:
        UnfitError: if both are large.
    """
    B = by_rows(b, rows, layout)
    ids = by_rows(ids.unsqueeze(-1).expand(*b.shape[:-1], 1), rows, layout).squeeze(-1)
    live = torch.ones_like(B[..., :1]) if padding_idx is None else (ids != padding_idx).to(B.dtype).unsqueeze(-1)
    ids, (size, width) = ids.unsqueeze(-1), weight.shape
    as_factors, as_sums = ids.shape[1] * (size + width), size * width
    if min(as_factors, as_sums) > MOST_NUMBERS:
        raise UnfitError(f"a row of its gradient takes {min(as_factors, as_sums)} numbers")
    if as_factors < as_sums:
        return Factors(B, b.new_zeros(rows, ids.shape[1], size).scatter_(2, ids, live))
    return b.new_zeros(rows, size, width).scatter_add_(1, ids.expand_as(B), B * live).flatten(1)


def _swapped(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors:
    """A weight stored (d_in, d_out): the roles of input and output gradient are exchanged."""
    return Factors(by_rows(b, rows, layout), by_rows(x, rows, layout))


LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.embedding: _embedding,
}
"""The rules of functions that multiply matrices; NotImplemented leaves a call alone."""
