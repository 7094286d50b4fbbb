"""The mask as a torch operation: out = x ∘ keep · 65536/T, every derivative of which is the operation again.

A library op whose backward is registered with ``register_autograd`` drops tangents in forward mode without an error.
So the ops here carry no autograd at all; one ``autograd.Function`` serves eager mode and ``torch.func``, and while
``torch.compile`` traces, where a custom jvp is refused, the mask is an ordinary ``torch.where``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dropscope import kernels

UNITS_LIMIT = 1 << 35

torch.library.define("dropscope::mask", "(Tensor x, Tensor streams, int seed, int site, int threshold) -> Tensor")
torch.library.define("dropscope::keep", "(Tensor streams, SymInt units, int seed, int site, int threshold) -> Tensor")


def unsigned(word: int) -> int:
    """The 64-bit word behind an int64, which is what the kernels take."""
    return word & 0xFFFF_FFFF_FFFF_FFFF


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word: torch's schemas know no unsigned integer."""
    return word - (1 << 64) if word >> 63 else word


def keep_threshold(p: float, function: str = "keep_threshold") -> int:
    """T = ⌊(1−p)·65536 + ½⌋: a unit is kept when its 16-bit lane is below T.

    Args:
        p: probability to drop a unit, as in torch.
        function: what refusals name.

    Returns:
        T, in 0..65536; 0 only for p = 1 and 65536 only for p = 0.

    Raises:
        TypeError: p is not a real number.
        ValueError: p is outside [0, 1] or NaN, or so near to 0 or 1 that 16 bits cannot hold it.
    """
    try:
        value = float(p)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: p must be a real number, got {p!r}") from error
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(f"{function}: p must lie in [0, 1], got {p!r}")
    threshold = math.floor((1.0 - value) * 65536.0 + 0.5)
    if 0.0 < value < 1.0 and not 0 < threshold < 65536:
        raise ValueError(f"{function}: p must be 0, 1, or at least 2**-17 away from both, got {p!r}")
    return threshold


def keep_scale(threshold: int, dtype: torch.dtype) -> float:
    """65536/T rounded to the accumulation type of ``dtype``: float for 32 and 16 bits, double for 64."""
    exact = 65536.0 / threshold
    if dtype == torch.float64:
        return exact
    # Rounded by hand to 24 bits, half to even: a tracer of older torch cannot read a number off a tensor.
    fraction, exponent = math.frexp(exact)
    return math.ldexp(round(math.ldexp(fraction, 24)), exponent - 24)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mask(x: Tensor, streams: Tensor, seed: int, site: int, threshold: int) -> Tensor:
    rows = streams.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        flat = x.contiguous().view(rows, -1)
        words = {"seed": unsigned(seed), "site": unsigned(site)}
        kernels.apply_mask(flat, streams, **words, threshold=threshold, out=out.view(rows, -1))
    return out


def _mask_fake(x: Tensor, streams: Tensor, seed: int, site: int, threshold: int) -> Tensor:  # noqa: ARG001
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(streams: Tensor, units: int, seed: int, site: int, threshold: int) -> Tensor:
    return kernels.keep_mask(streams, units, seed=unsigned(seed), site=unsigned(site), threshold=threshold)


def _keep_fake(streams: Tensor, units: int, seed: int, site: int, threshold: int) -> Tensor:  # noqa: ARG001
    return torch.empty((streams.shape[0], units), dtype=torch.bool, device=streams.device)


def _keep_vmap(
    info: Any,  # noqa: ARG001
    in_dims: Any,
    streams: Tensor,
    units: int,
    seed: int,
    site: int,
    threshold: int,
) -> tuple[Tensor, int | None]:
    if in_dims[0] is None:
        return torch.ops.dropscope.keep(streams, units, seed, site, threshold), None
    rows = streams.movedim(in_dims[0], 0)
    keep = torch.ops.dropscope.keep(rows.reshape(-1), units, seed, site, threshold)
    return keep.view(*rows.shape, units), 0


torch.library.register_kernel("dropscope::mask", None, _mask)
torch.library.register_fake("dropscope::mask", _mask_fake)
torch.library.register_kernel("dropscope::keep", None, _keep)
torch.library.register_fake("dropscope::keep", _keep_fake)
torch.library.register_vmap("dropscope::keep", _keep_vmap)


class _Mask(torch.autograd.Function):
    """x ↦ x ∘ keep · 65536/T is linear and diagonal: backward, jvp and double backward are itself."""

    @staticmethod
    def forward(x: Tensor, streams: Tensor, seed: int, site: int, threshold: int) -> Tensor:
        out: Tensor = torch.ops.dropscope.mask(x, streams, seed, site, threshold)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.where = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grad, ctx.saved_tensors[0], *ctx.where), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _apply(tangent, ctx.saved_tensors[0], *ctx.where)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, streams: Tensor, *where: int) -> tuple[Tensor, int]:
        size = info.batch_size
        x = x.unsqueeze(0).expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        rows = streams.expand(size, -1) if in_dims[1] is None else streams.movedim(in_dims[1], 0)
        out = _apply(x.reshape(-1, *x.shape[2:]), rows.reshape(-1), *where)
        return out.reshape(x.shape), 0


_general = cast("Callable[..., Tensor]", _Mask.apply)
_eager = cast("Callable[..., Tensor]", super(torch.autograd.Function, _Mask).apply)


def _apply(x: Tensor, streams: Tensor, *where: int) -> Tensor:
    """``_Mask.apply``, which outside torch.func spends two thirds of its time on inspecting a signature."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch._C._are_functorch_transforms_active() or wrapped(x) or wrapped(streams):
        return _general(x, streams, *where)
    return _eager(x, streams, *where)


def keep_rows(streams: Tensor, units: int, seed: int, site: int, threshold: int) -> Tensor:
    """keep, bool (rows, units), for any T in 0..65536."""
    if threshold in (0, 65536):
        return torch.full((streams.shape[0], units), threshold != 0, device=streams.device)
    keep: Tensor = torch.ops.dropscope.keep(streams, units, signed(seed), signed(site), threshold)
    return keep


def mask_rows(x: Tensor, streams: Tensor, seed: int, site: int, threshold: int) -> Tensor:
    """Mask x of shape (rows, ...), one stream a row: x ∘ keep · 65536/T; T = 65536 returns x itself, T = 0 zeros."""
    if threshold == 65536:
        return x
    if threshold == 0:
        return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
    if torch.compiler.is_compiling():
        keep = torch.ops.dropscope.keep(
            streams, x.numel() // max(streams.shape[0], 1), signed(seed), signed(site), threshold
        )
        return select(keep.view(x.shape), threshold, x)
    return _apply(x, streams, signed(seed), signed(site), threshold)


def select(keep: Tensor, threshold: int, x: Tensor) -> Tensor:
    """The same from a mask that broadcasts against x: kept values rounded once, dropped ones +0 whatever x was."""
    if threshold == 65536:
        return x
    if threshold == 0:
        return x.masked_fill(~keep, 0.0)
    scaled = (x.to(wide(x.dtype)) * keep_scale(threshold, x.dtype)).to(x.dtype)
    return torch.where(keep, scaled, torch.zeros((), dtype=x.dtype, device=x.device))
