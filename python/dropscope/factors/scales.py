"""Rules of the functions that scale and shift: norms, and sums and products with a parameter that is broadcast.

Their per-sample gradients are no larger than the parameter: they are summed at once, and kept as rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.factors.uses import Layout, UnfitError, channel_bias, last_axis_bias

if TYPE_CHECKING:
    from dropscope.factors.recorder import Recorder


def _norm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    reduce: Callable[[Tensor, int, Layout], Tensor] = channel_bias,
) -> Any:
    """A norm and what it is scaled and shifted by; ``reduce`` sums over all that a parameter's entry serves."""
    if weight is None:
        return NotImplemented

    def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
        return reduce(b * function(x, None, None), rows, layout)

    return recorder.run(input, weight, bias, function, weight_part, reduce)


def _last_axes(count: int) -> Callable[[Tensor, int, Layout], Tensor]:
    """Sums over all but the last axes."""
    return lambda b, rows, layout: last_axis_bias(b.flatten(b.ndim - count), rows, layout)


def _layer_norm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, w, b, eps)

    return _norm(recorder, input, weight, bias, function, _last_axes(len(normalized_shape)))


def _rms_norm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    def function(x: Tensor, w: Tensor | None, _: Tensor | None) -> Tensor:
        return F.rms_norm(x, normalized_shape, w, eps)

    return _norm(recorder, input, weight, None, function, _last_axes(len(normalized_shape)))


def _group_norm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return _norm(recorder, input, weight, bias, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps))


def _batch_norm(
    recorder: Recorder,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """With running statistics, as in eval mode; those of a batch would mix its samples."""
    if training:
        return NotImplemented

    def function(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, w, b, False, momentum, eps)

    return _norm(recorder, input, weight, bias, function)


def _add(recorder: Recorder, input: Any, other: Any, **options: Any) -> Any:  # noqa: A002
    found = _broadcast(recorder, input, other, options)
    if found is None:
        return NotImplemented
    x, p = found

    def weight_part(_: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
        return summed(b, p.shape, rows, layout)

    return recorder.run(x, p, None, lambda x, w, _: x + w, weight_part, keep=False)


def _mul(recorder: Recorder, input: Any, other: Any, **options: Any) -> Any:  # noqa: A002
    found = _broadcast(recorder, input, other, options)
    if found is None:
        return NotImplemented
    x, p = found

    def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
        return summed(b * x, p.shape, rows, layout)

    return recorder.run(x, p, None, lambda x, w, _: x * w, weight_part)


def _expand(recorder: Recorder, p: Tensor, *sizes: Any, **options: Any) -> Any:
    """A class token repeated for every row of the batch."""
    out = p.expand(*sizes, **options)
    if out.ndim < 2 or recorder.rows not in out.shape[:2]:
        return NotImplemented

    def weight_part(_: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
        return summed(b, p.shape, rows, layout)

    ones = p.new_empty(0)
    return recorder.run(ones, p, None, lambda _, w, __: w.expand(*sizes, **options), weight_part, keep=False)


def _broadcast(recorder: Recorder, a: Any, b: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The tensor, and the captured parameter that is broadcast to its shape; None for other calls."""
    x, p = (b, a) if recorder.captures(a) else (a, b)
    if options or not isinstance(x, Tensor) or not isinstance(p, Tensor) or recorder.captures(x) or x.dtype != p.dtype:
        return None
    fits = p.ndim <= x.ndim and all(mine in (1, its) for mine, its in zip(p.shape[::-1], x.shape[::-1], strict=False))
    return (x, p) if fits else None


def summed(b: Tensor, shape: torch.Size, rows: int, layout: Layout) -> Tensor:
    """The gradient of a parameter of this shape for each row, from that of the output it was broadcast to.

    Args:
        b: the output's gradient.
        shape: of the parameter.
        rows: samples times draws.
        layout: which axis of b is the row.

    Returns:
        (rows, numel).

    Raises:
        UnfitError: if that axis is no multiple of the rows, or the parameter differs along it.
    """
    own = (1,) * (b.ndim - len(shape)) + tuple(shape)
    axis = 0 if layout == "rows" else 1
    if b.ndim <= axis or b.shape[axis] % rows or own[axis] != 1 or (axis and b.shape[axis] != rows):
        raise UnfitError(f"a tensor of shape {tuple(b.shape)} has no axis of {rows} rows")
    b, own = b.movedim(axis, 0), (own[axis], *own[:axis], *own[axis + 1 :])
    b = b.reshape(rows, -1, *b.shape[1:])
    over = [1, *(2 + i for i, length in enumerate(own[1:]) if length == 1)]
    return b.sum(over).reshape(rows, -1)


SCALES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.rms_norm: _rms_norm,
    torch.add: _add,
    Tensor.add: _add,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.expand: _expand,
}
"""The rules of functions that scale and shift; NotImplemented leaves a call alone."""
