"""One rule per function that consumes a parameter: how its output gradient becomes a per-sample gradient.

A rule runs the function with its parameters detached, so that no weight gradient is computed, and records the input
and the graph edge of the output. Once the gradient b of that output is known, the gradient of row r is Σ_t b_rt a_rtᵀ:
the :class:`Factors`. Rules assume nothing about which axis is the sample; the capture tries the layouts and checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dropscope.kernels import FirstOperand, Masked
from dropscope.mask_op import mask_rows

Layout = Literal["rows", "time"]
LAYOUTS: tuple[Layout, ...] = ("rows", "time")
# One-hot rows larger than this would dwarf the network: such an embedding takes another route.
MAX_ONE_HOT = 1 << 27


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
        inputs: what the weight met; one row per sample only when ``shared``; :class:`Masked` right after the first
            dropout.
        shared: the draws of a sample had bit-equal inputs.
        weight_part: (inputs, b, rows, layout) -> Factors or (rows, numel) gradients.
        bias_part: (b, rows, layout) -> (rows, numel) gradients.
        paired: the bias gradient is Σ_t of the weight's factor B.
        dtype: of the output, which autocast may have made shorter than the parameters'.
    """

    weight: str | None
    bias: str | None
    edge: GradientEdge
    inputs: FirstOperand
    shared: bool
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


class Recorder:
    """Handlers for one forward pass, and the uses that they recorded.

    Args:
        names: id of a parameter -> its name, for the parameters to capture.
        samples: samples in the pass.
        draws: draws of each; rows are sample-major.
    """

    def __init__(self, names: Mapping[int, str], samples: int, draws: int) -> None:
        self.names, self.samples, self.draws = names, samples, draws
        self.rows = samples * draws
        self.uses: list[Use] = []
        self._dropped: Dropped | None = None

    def handlers(self) -> dict[Callable[..., Any], Callable[[Any], Any]]:
        """The functions that consume parameters, each with its rule."""
        return {
            F.linear: self._guard(self._linear),
            torch.addmm: self._guard(self._addmm),
            torch.matmul: self._guard(self._matmul),
            Tensor.matmul: self._guard(self._matmul),
            Tensor.__matmul__: self._guard(self._matmul),
            F.conv1d: self._guard(self._conv),
            F.conv2d: self._guard(self._conv),
            F.layer_norm: self._guard(self._layer_norm),
            F.group_norm: self._guard(self._group_norm),
            F.embedding: self._guard(self._embedding),
            mask_rows: self._watch,
        }

    def forget(self) -> None:
        """Let go of what was held to recognise inputs."""
        self._dropped = None

    def _watch(self, call: Any) -> Any:
        """Remember the mask just made if it is on what the draws share, as a single draw may."""
        x, *mask = call.args
        out = call.proceed()
        shared = self.draws == 1 or self._shared(x)
        self._dropped = Dropped(x, out, tuple(mask), self.draws) if shared else None
        return out

    def _guard(self, rule: Callable[..., Any]) -> Callable[[Any], Any]:
        def handler(call: Any) -> Any:
            operands = (*call.args, *call.kwargs.values())
            if not torch.is_grad_enabled() or not any(id(operand) in self.names for operand in operands):
                return NotImplemented
            return rule(*call.args, **call.kwargs)

        return handler

    def _claim(self, parameter: Tensor | None, rooted: bool) -> tuple[str | None, Tensor | None]:
        """Name of a captured parameter and what stands for it in the graph."""
        if parameter is None or id(parameter) not in self.names:
            return None, parameter
        return self.names[id(parameter)], parameter.detach().requires_grad_(not rooted)

    def _shared(self, x: Tensor) -> bool:
        if self.draws == 1 or x.ndim < 2 or x.shape[0] != self.rows or not x.numel():
            return False
        grouped = x.detach().view(self.samples, self.draws, -1) if x.is_contiguous() else None
        if grouped is None or not torch.equal(grouped[0, 1:], grouped[0, :1].expand_as(grouped[0, 1:])):
            return False
        return torch.equal(grouped[:, 1:], grouped[:, :1].expand_as(grouped[:, 1:]))

    def _affine(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight_part: Callable[[Any, Tensor, int, Layout], Factors | Tensor],
        bias_part: Callable[[Tensor, int, Layout], Tensor] = last_axis_bias,
        *,
        paired: bool = False,
        shareable: bool = False,
        maskable: bool = False,
    ) -> Tensor:
        """Run function(x, weight, bias), linear in its parameters, and record the use."""
        rooted = x.requires_grad
        weight_name, weight = self._claim(weight, rooted)  # type: ignore[assignment]
        bias_name, bias = self._claim(bias, rooted or weight.requires_grad)
        shared = shareable and self._shared(x)
        if shared and not rooted:
            # Draws that have not met a mask yet: compute the sample once. Not when x has a history, because the
            # gradient would then return to the first draw only.
            y = function(x[:: self.draws], weight, bias).repeat_interleave(self.draws, 0)
        else:
            y = function(x, weight, bias)
        masked = None
        if maskable and not shared and self._dropped is not None and x.dtype == y.dtype == weight.dtype:  # no autocast
            masked = self._dropped.operand(x)
        inputs = masked or (x.detach()[:: self.draws].contiguous() if shared else x.detach())
        edge = get_gradient_edge(y)
        self.uses.append(Use(weight_name, bias_name, edge, inputs, shared, weight_part, bias_part, paired, y.dtype))
        return y

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        return self._affine(
            input, weight, bias, F.linear, self._linear_factors, paired=True, shareable=True, maskable=True
        )

    def _linear_factors(self, x: FirstOperand, b: Tensor, rows: int, layout: Layout) -> Factors:
        if isinstance(x, Masked):
            if layout != "rows":
                raise UnfitError("masked rows are rows of the batch")
            return Factors(x, by_rows(b, rows, layout))
        held = rows // self.draws if x.shape[0] != b.shape[0] else rows
        return Factors(by_rows(x, held, layout), by_rows(b, rows, layout))

    def _addmm(
        self,
        input: Tensor,  # noqa: A002
        mat1: Tensor,
        mat2: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> Any:
        if beta != 1 or alpha != 1 or input.ndim != 1 or id(mat1) in self.names:
            return NotImplemented
        function = torch.addmm  # whose bias comes first
        run: Any = lambda x, w, b: function(b, x, w)  # noqa: E731
        return self._affine(mat1, mat2, input, run, _swapped)

    def _matmul(self, input: Tensor, other: Tensor) -> Any:  # noqa: A002
        if other.ndim != 2 or id(input) in self.names:
            return NotImplemented
        return self._affine(input, other, None, lambda x, w, _: torch.matmul(x, w), _swapped)

    def _conv(
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        spatial = weight.ndim - 2
        if groups != 1 or isinstance(padding, str) or input.ndim != weight.ndim:
            return NotImplemented
        function = F.conv1d if spatial == 1 else F.conv2d
        kernel, steps = tuple(weight.shape[2:]), [_tuple(v, spatial) for v in (dilation, padding, stride)]

        def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors:
            if layout != "rows" or b.shape[0] != rows:
                raise UnfitError(f"a convolution of {b.shape[0]} images has no row for each of {rows}")
            image, ones = (x, ()) if spatial == 2 else (x.unsqueeze(2), (1,))
            zeros = (0,) * len(ones)
            patches = F.unfold(
                image, (*ones, *kernel), *((*pad, *v) for pad, v in zip((ones, zeros, ones), steps, strict=True))
            )
            return Factors(patches.mT, b.flatten(2).mT)

        return self._affine(
            input,
            weight,
            bias,
            lambda x, w, b: function(x, w, b, stride, padding, dilation),
            weight_part,
            channel_bias,
            paired=True,
            shareable=True,
        )

    def _layer_norm(
        self,
        input: Tensor,  # noqa: A002
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        if weight is None:
            return NotImplemented
        size = math.prod(normalized_shape)

        def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
            scaled = b * F.layer_norm(x, normalized_shape, None, None, eps)
            return by_rows(scaled.reshape(*scaled.shape[: x.ndim - len(normalized_shape)], size), rows, layout).sum(1)

        def bias_part(b: Tensor, rows: int, layout: Layout) -> Tensor:
            return by_rows(b.reshape(*b.shape[: b.ndim - len(normalized_shape)], size), rows, layout).sum(1)

        return self._affine(
            input,
            weight,
            bias,
            lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps),
            weight_part,
            bias_part,
        )

    def _group_norm(
        self,
        input: Tensor,  # noqa: A002
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        if weight is None:
            return NotImplemented

        def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Tensor:
            return channel_bias(b * F.group_norm(x, num_groups, None, None, eps), rows, layout)

        return self._affine(
            input,
            weight,
            bias,
            lambda x, w, b: F.group_norm(x, num_groups, w, b, eps),
            weight_part,
            channel_bias,
        )

    def _embedding(
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,  # noqa: ARG002
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        size = weight.shape[0]
        if max_norm is not None or scale_grad_by_freq or sparse or input.numel() * size > MAX_ONE_HOT:
            return NotImplemented

        def weight_part(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors:
            hot = F.one_hot(x, size).to(b.dtype)
            if padding_idx is not None:
                hot[..., padding_idx] = 0
            return Factors(by_rows(b, rows, layout), by_rows(hot, rows, layout))

        return self._affine(input, weight, None, lambda x, w, _: F.embedding(x, w, padding_idx), weight_part)


def _swapped(x: Tensor, b: Tensor, rows: int, layout: Layout) -> Factors:
    """A weight stored (d_in, d_out): the roles of input and output gradient are exchanged."""
    return Factors(by_rows(b, rows, layout), by_rows(x, rows, layout))


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)
