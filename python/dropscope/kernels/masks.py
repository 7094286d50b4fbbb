"""Kernels of the masks room: dropout masks, format 1."""

from __future__ import annotations

import torch
from torch import Tensor

from dropscope import reference
from dropscope.kernels._launch import DTYPES, _core, contiguous_rows, device_of, launch, matrix, on


def _check(name: str, streams: Tensor, rows: int | None, units: int, seed: int, site: int, threshold: int) -> None:
    if streams.dtype != torch.int64 or streams.dim() != 1:
        raise TypeError(f"{name}: streams must be an int64 vector, got {streams.dtype} of shape {tuple(streams.shape)}")
    if rows is not None and streams.shape[0] != rows:
        raise ValueError(f"{name}: streams must have one entry per row of x ({rows}), got {streams.shape[0]}")
    if not 0 <= units <= 1 << 35:
        raise ValueError(f"{name}: units must be in 0..2^35, got {units}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"{name}: seed must be in 0..2^64-1, got {seed}")
    if not 0 <= site < 1 << 64:
        raise ValueError(f"{name}: site must be in 0..2^64-1, got {site}")
    if not 0 < threshold < 65536:
        raise ValueError(f"{name}: threshold must be in 1..65535, got {threshold}")


def keep_mask(streams: Tensor, units: int, *, seed: int, site: int, threshold: int) -> Tensor:
    """The mask itself: keep ⇔ lane < threshold.

    Args:
        streams: int64 (rows,), draw << 32 | sample of each row.
        units: units in a row, at most 2³⁵.
        seed: 64-bit seed.
        site: 64-bit site.
        threshold: T in 1..65535; the keep probability is T/65536.

    Returns:
        bool (rows, units) on the device of ``streams``.

    Raises:
        TypeError: streams is not an int64 vector.
        ValueError: a number is out of its range.
    """
    _check("keep_mask", streams, None, units, seed, site, threshold)
    device = device_of(streams)
    if device is None:
        return reference.keep_mask(streams, units, seed=seed, site=site, threshold=threshold)
    streams = streams.contiguous()
    rows = streams.shape[0]
    out = torch.empty((rows, units), dtype=torch.bool, device=streams.device)
    with on(device, streams):
        _core.keep_mask(
            device, out.data_ptr(), rows, units, streams.data_ptr(), seed, site, threshold, launch(device, streams)
        )
    return out


def apply_mask(
    x: Tensor,
    streams: Tensor,
    *,
    seed: int,
    site: int,
    threshold: int,
    group: int = 1,
    skip: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Apply the mask, out = x ∘ mask · 65536/threshold: its own backward, double backward and JVP.

    Kept values are multiplied in float (double for float64) and rounded once; dropped values are +0 whatever x was.

    Args:
        x: (rows, units), floating point, or fewer rows of which each serves ``group`` consecutive streams.
        streams: int64 (rows,), draw << 32 | sample of each row.
        seed: 64-bit seed.
        site: 64-bit site.
        threshold: T in 1..65535; the keep probability is T/65536.
        group: row r of out is made of row (skip + r) // group of x.
        skip: streams left out of those that the first row of x serves, less than ``group``.
        out: (streams, units), of the dtype of x; may be x itself where group = 1. A new tensor by default.

    Returns:
        out.

    Raises:
        TypeError: x is not floating point, streams is not an int64 vector, or out differs from x in dtype.
        ValueError: shapes disagree or a number is out of its range.
    """
    if not x.is_floating_point():
        raise TypeError(f"apply_mask: x must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"apply_mask: x must have shape (rows, units), got {tuple(x.shape)}")
    if group < 1 or not 0 <= skip < group:
        raise ValueError(f"apply_mask: group must be at least 1 and skip in 0..group-1, got {group} and {skip}")
    rows = x.shape[0] if group == 1 else None
    _check("apply_mask", streams, rows, x.shape[1], seed, site, threshold)
    if x.shape[0] != -(-(skip + len(streams)) // group):
        raise ValueError(
            f"apply_mask: x must have a row for each {group} of {skip} + {len(streams)} streams, got {x.shape[0]}"
        )
    if out is not None and out.dtype != x.dtype:
        raise TypeError(f"apply_mask: out must have the dtype of x ({x.dtype}), got {out.dtype}")
    shape = (len(streams), x.shape[1])
    if out is not None and out.shape != shape:
        raise ValueError(f"apply_mask: out must have shape {shape}, got {tuple(out.shape)}")

    tensors = (x, streams) if out is None else (x, streams, out)
    device = device_of(*tensors) if x.dtype in DTYPES else None
    if device is None:
        return reference.apply_mask(
            x, streams, seed=seed, site=site, threshold=threshold, group=group, skip=skip, out=out
        )
    streams = streams.contiguous()
    source = x if contiguous_rows(x) else x.contiguous()
    target = out if out is not None and contiguous_rows(out) else source.new_empty(shape)
    masks = (streams.data_ptr(), seed, site, threshold)
    with on(device, x):
        _core.apply_mask(device, matrix(source), matrix(target), *masks, group, skip, launch(device, x))
    if out is None or target is out:
        return target
    return out.copy_(target)
