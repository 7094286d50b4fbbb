"""Kernels of the factors room: per-sample gradients Σ_t b_it a_itᵀ of linear maps, never formed.

Rows are sample-major: sample i·M + m is draw m of sample i, and A may hold one row per M consecutive samples where
the draws share it, or be :class:`Masked`: what they share under a mask for each, remade tile by tile. Products run in
the dtype of the factors, sums over tiles in the dtype of ``out``. bfloat16 factors are multiplied as they are where the
CPU has units for it, each product of a tile being rounded once more to bfloat16 (relative error 2⁻⁹, independent
between entries); elsewhere tiles are widened to float32 in cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropscope import reference
from dropscope.kernels import _slabs as slabs
from dropscope.kernels import _tiles as tiles
from dropscope.kernels._gram import Layer, add_gram
from dropscope.kernels._launch import contiguous_rows, device_of
from dropscope.kernels._slabs import group_of
from dropscope.kernels.masked import FirstOperand, Masked, whole

# Steps from which the factors of one sample fill a matrix product by themselves, scaled by it and not before it.
_LONG = 128

__all__ = ["accumulate", "center", "gram", "gram_sum", "project", "sq_norms"]


def _check_factors(name: str, A: FirstOperand, B: Tensor, label: str = "") -> None:
    for letter, x in (("A", A), ("B", B)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: {letter}{label} must be floating point, got {x.dtype}")
        if len(x.shape) != 3:
            raise ValueError(f"{name}: {letter}{label} must have shape (samples, T, units), got {tuple(x.shape)}")
    if A.dtype != B.dtype:
        raise TypeError(f"{name}: A{label} and B{label} must have one dtype, got {A.dtype} and {B.dtype}")
    if A.device != B.device:
        raise ValueError(f"{name}: A{label} and B{label} must be on one device, got {A.device} and {B.device}")
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"{name}: A{label} and B{label} must have the same T, got {A.shape[1]} and {B.shape[1]}")
    samples, rows = B.shape[0], A.shape[0]
    if rows > samples or (samples and (rows == 0 or samples % rows)):
        raise ValueError(f"{name}: the rows of A{label} must divide those of B{label} ({samples}), got {rows}")


def _check(name: str, label: str, x: FirstOperand, shape: tuple[int, ...], like: FirstOperand) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: {label} must be floating point, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: {label} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: {label} must be on the device of the factors ({like.device}), got {x.device}")


def _check_pair(name: str, A: FirstOperand, B: Tensor, A2: FirstOperand, B2: Tensor, out: Tensor) -> None:
    _check_factors(name, A, B)
    _check_factors(name, A2, B2, "2")
    if A2.dtype != A.dtype:
        raise TypeError(f"{name}: A2 must have the dtype of A ({A.dtype}), got {A2.dtype}")
    _check(name, "A2", A2, (*A2.shape[:2], A.shape[2]), A)
    _check(name, "B2", B2, (*B2.shape[:2], B.shape[2]), A)
    _check(name, "out", out, (B.shape[0], B2.shape[0]), A)


def _compiled(operands: tuple[FirstOperand, ...], others: tuple[Tensor, ...], sums: Tensor | None) -> bool:
    """Whether the tiles can serve; else the reference does."""
    factors = [x.x if isinstance(x, Masked) else x for x in operands]
    others += tuple(x.streams for x in operands if isinstance(x, Masked))
    if any(x.dtype not in tiles.FACTOR_DTYPES or x.dtype != factors[0].dtype for x in factors):
        return False
    if sums is not None and sums.dtype not in tiles.SUM_DTYPES:
        return False
    return device_of(*factors, *others) is not None


def _made(width: int, A: FirstOperand) -> int:
    """Numbers a row that a tile makes: of what is ``width`` wide, and of masked or widened rows."""
    return width + A.shape[2] if isinstance(A, Masked) or A.dtype != tiles.product_dtype(A) else width


@torch.no_grad()
def project(A: FirstOperand, B: Tensor, V: Tensor, out: Tensor) -> None:
    """Inner products of per-sample gradients with K matrices: out[i, k] += Σ_t b_itᵀ V_k a_it.

    Args:
        A: (N/M, T, d_in), each row shared by M consecutive samples, or masked rows.
        B: (N, T, d_out), of the dtype of A.
        V: (K, d_out, d_in), rounded to the dtype of A.
        out: (N, K), float32 or float64; added to.

    Raises:
        TypeError: an argument is not floating point, or A and B differ in dtype.
        ValueError: shapes or devices disagree.
    """
    _check_factors("project", A, B)
    _check("project", "V", V, (V.shape[0] if V.dim() else 0, B.shape[2], A.shape[2]), A)
    _check("project", "out", out, (B.shape[0], V.shape[0]), A)
    if out.numel() == 0:
        return
    if not _compiled((A, B), (V, out), out):
        reference.project(whole(A), B, V, out)
        return
    if not contiguous_rows(out):
        sums = out.contiguous()
        project(A, B, V, sums)
        out.copy_(sums)
        return
    if slabs.pays(A, B, V.shape[0]):
        slabs.project(A, B, V, out)
        return
    dtype = tiles.product_dtype(A)
    V, group = V.to(dtype), group_of(A, B)
    left: FirstOperand = A
    right: FirstOperand = B
    if group == 1 and A.shape[2] < B.shape[2]:  # the product is then narrower
        left, right, V = B, A, V.transpose(1, 2)
    steps, units = right.shape[1:]
    together = max(1, min(V.shape[0], 2048 // max(1, units)))
    rows = max(1, tiles.tile_rows(_made(together * units, A), dtype.itemsize, B.device) // steps)
    space = tiles.Workspace(min(rows, left.shape[0]) * steps * together * units, dtype, B.device)
    packing = tiles.packing_space(A, rows, dtype)
    for first in range(0, V.shape[0], together):
        stacked = V[first : first + together].reshape(-1, V.shape[2])
        for start in range(0, left.shape[0], rows):
            stop = start + rows
            product = space.multiply(tiles.packed(left, start, stop, dtype, packing), stacked.T)
            b = tiles.packed(right, start * group, stop * group, B.dtype if right is B else dtype, packing)
            tiles.row_dots(product, b, out[start * group : stop * group, first : first + together], group, steps)


@torch.no_grad()
def accumulate(A: FirstOperand, B: Tensor, S: Tensor, out: Tensor) -> None:
    """Weighted sums of per-sample gradients, the adjoint of :func:`project`: out[k] += Σ_i S[i, k] Σ_t b_it a_itᵀ.

    The samples that share a row of A are summed before the product, which then has N/M rows.

    Args:
        A: (N/M, T, d_in), each row shared by M consecutive samples, or masked rows.
        B: (N, T, d_out), of the dtype of A.
        S: (N, K).
        out: (K, d_out, d_in), float32 or float64; added to.

    Raises:
        TypeError: an argument is not floating point, or A and B differ in dtype.
        ValueError: shapes or devices disagree.
    """
    _check_factors("accumulate", A, B)
    _check("accumulate", "S", S, (B.shape[0], S.shape[1] if S.dim() == 2 else 0), A)
    _check("accumulate", "out", out, (S.shape[1], B.shape[2], A.shape[2]), A)
    if out.numel() == 0 or B.numel() == 0:
        return
    if not _compiled((A, B), (S, out), out):
        reference.accumulate(whole(A), B, S, out)
        return
    if slabs.pays(A, B, S.shape[1]):
        slabs.accumulate(A, B, S, out)
        return
    group, (steps, units) = group_of(A, B), B.shape[1:]
    S = S.to(torch.promote_types(A.dtype, torch.float32))
    S = S if contiguous_rows(S) else S.contiguous()
    dtype = tiles.product_dtype(A)
    if group == 1 and steps >= _LONG and S.shape[1] == 1 and not B.is_cuda and tiles.adds_in_place(out, B[0], B[0]):
        packing = tiles.packing_space(A, 1, dtype)
        for i, (b, weight) in enumerate(zip(B.mT, S.squeeze(1).tolist(), strict=True)):
            a = tiles.packed(A, i, i + 1, dtype, packing) if isinstance(A, Masked) else A[i]
            out[0].addmm_(b, a, alpha=weight)
        return
    # Sums that are parts of wider rows are no one matrix: then a product for each.
    together = max(1, min(S.shape[1], 2048 // max(1, units))) if out.is_contiguous() else 1
    rows = max(1, tiles.tile_rows(_made(together * units, A), dtype.itemsize, B.device, near=True) // steps)
    space = tiles.Workspace(min(rows, A.shape[0]) * steps * together * units, dtype, B.device)
    packing = tiles.packing_space(A, rows, dtype)
    for first in range(0, S.shape[1], together):
        weights, total = S[:, first : first + together], tiles.Sum(out[first : first + together].flatten(0, 1), dtype)
        for start in range(0, A.shape[0], rows):
            a, b = tiles.packed(A, start, start + rows, dtype, packing), B[start * group : (start + rows) * group]
            scaled = space.take(a.shape[0], weights.shape[1] * units)
            tiles.scale_rows(tiles.flat_rows(b), weights[start * group : (start + rows) * group], scaled, group, steps)
            total.add(scaled, a)
        total.finish()


@torch.no_grad()
def gram(A: FirstOperand, B: Tensor, A2: FirstOperand, B2: Tensor, out: Tensor, *, bias: bool = False) -> None:
    """Inner products of per-sample gradients: out[i, j] += ⟨Σ_t b_it ã_itᵀ, Σ_s b'_js ã'_jsᵀ⟩.

    T = 1 is the Hadamard product of AA'ᵀ and BB'ᵀ. Longer sequences take the cheaper of its sum over (t, s), T·T'
    times the work, and of the products of materialised gradients. With A2 and B2 the same tensors as A and B, one
    half is computed and mirrored.

    Args:
        A: (N/M, T, d_in), each row shared by M consecutive samples, or masked rows.
        B: (N, T, d_out), of the dtype of A.
        A2: (N'/M', T', d_in), or masked rows.
        B2: (N', T', d_out).
        out: (N, N'), float32 or float64; added to.
        bias: ã is a with a 1 appended, so that the bias's gradient is counted.

    Raises:
        TypeError: an argument is not floating point, or the factors differ in dtype.
        ValueError: shapes or devices disagree.
    """
    _check_pair("gram", A, B, A2, B2, out)
    if out.numel() == 0:
        return
    if not _compiled((A, B, A2, B2), (out,), out):
        reference.gram(whole(A), B, whole(A2), B2, out, bias=bias)
        return
    add_gram([(A, B, bias)], [(A2, B2, bias)], out)


@torch.no_grad()
def gram_sum(rows: Sequence[Layer], cols: Sequence[Layer], out: Tensor) -> None:
    """The sum of :func:`gram` over layers, with all layers of a tile added while it is in cache.

    Args:
        rows: (A, B, bias) of each layer.
        cols: (A2, B2, bias) of each layer; the very same tensors as ``rows`` for a symmetric matrix.
        out: (N, N'), float32 or float64; added to.

    Raises:
        TypeError: an argument is not floating point, or the factors of a layer differ in dtype.
        ValueError: shapes, devices or numbers of layers disagree.
    """
    if len(rows) != len(cols):
        raise ValueError(f"gram_sum: cols must have as many layers as rows ({len(rows)}), got {len(cols)}")
    for (A, B, bias), (A2, B2, bias2) in zip(rows, cols, strict=True):
        _check_pair("gram_sum", A, B, A2, B2, out)
        if bias != bias2:
            raise ValueError(f"gram_sum: both sides must count the bias alike, got {bias} and {bias2}")
    if out.numel() == 0 or not rows:
        return
    factors = [x for layer in (*rows, *cols) for x in layer[:2]]
    if _compiled(tuple(factors), (out,), out):
        add_gram(rows, cols, out)
        return
    for (A, B, bias), (A2, B2, _) in zip(rows, cols, strict=True):
        gram(A, B, A2, B2, out, bias=bias)


def _materialise(A: Tensor, B: Tensor, bias: bool) -> Tensor:
    """Per-sample gradients (n, d_out · d_in), followed by the bias's (n, d_out)."""
    gradients = torch.bmm(B.transpose(1, 2), A).flatten(1)
    return torch.cat((gradients, B.sum(1)), 1) if bias else gradients


@torch.no_grad()
def sq_norms(A: FirstOperand, B: Tensor, *, bias: bool = False) -> Tensor:
    """Squared norms of per-sample gradients, ‖Σ_t b_it ã_itᵀ‖²_F: the diagonal of :func:`gram`.

    Args:
        A: (N/M, T, d_in), each row shared by M consecutive samples, or masked rows.
        B: (N, T, d_out), of the dtype of A.
        bias: ã is a with a 1 appended.

    Returns:
        float64 (N,).

    Raises:
        TypeError: a factor is not floating point, or they differ in dtype.
        ValueError: shapes or devices disagree.
    """
    _check_factors("sq_norms", A, B)
    if B.shape[0] == 0:
        return torch.zeros(0, dtype=torch.float64, device=B.device)
    if not _compiled((A, B), (), None):
        return reference.sq_norms(whole(A), B, bias=bias)
    group, (steps, units) = group_of(A, B), B.shape[1:]
    out = torch.zeros((B.shape[0], 1), dtype=torch.float64, device=B.device)
    if steps == 1:
        shared = torch.zeros((A.shape[0], 1), dtype=torch.float64, device=B.device)
        for x, sums in ((A, shared), (B, out)):
            rows = tiles.tile_rows(x.shape[2], x.dtype.itemsize, B.device) if isinstance(x, Masked) else len(sums)
            for start in range(0, len(sums), rows):
                tile = tiles.packed(x, start, start + rows, x.dtype)
                tiles.row_dots(tile, tile, sums[start : start + rows])
        return (out.view(-1, group) * (shared + float(bias))).view(-1)
    ghost = steps * steps * (A.shape[2] / group + units) <= steps * A.shape[2] * units
    width = steps * steps if ghost else A.shape[2] * units
    size = max(1, (1 << (26 if B.is_cuda else 20)) // max(1, width * group))
    wide = torch.promote_types(A.dtype, torch.float32)
    for start in range(0, A.shape[0], size):
        a = tiles.packed(A, start, start + size, wide).view(-1, steps, A.shape[2])
        b = B[start * group : (start + size) * group].to(wide)
        target = out[start * group : (start + size) * group]
        if ghost:
            P = torch.bmm(a, a.transpose(1, 2)).flatten(1) + float(bias)
            tiles.row_dots(P, torch.bmm(b, b.transpose(1, 2)).flatten(1), target, group)
        else:
            gradients = _materialise(a.repeat_interleave(group, 0), b, bias)
            tiles.row_dots(gradients, gradients, target)
    return out.view(-1)


@torch.no_grad()
def center(X: Tensor, draws: int, scale: float = 1.0) -> Tensor:
    """Subtract, in place, the mean over each run of ``draws`` consecutive rows, and multiply by ``scale``.

    X[i·M + m] ← scale (X[i·M + m] − M⁻¹ Σ_l X[i·M + l]), means in float64.

    Args:
        X: (n·M, K), floating point; changed.
        draws: M, which divides the number of rows.
        scale: a factor.

    Returns:
        X.

    Raises:
        TypeError: X is not floating point.
        ValueError: X is not a matrix or ``draws`` does not divide its rows.
    """
    if not X.is_floating_point():
        raise TypeError(f"center: X must be floating point, got {X.dtype}")
    if X.dim() != 2:
        raise ValueError(f"center: X must have shape (rows, K), got {tuple(X.shape)}")
    if draws < 1 or X.shape[0] % draws:
        raise ValueError(f"center: draws must divide the {X.shape[0]} rows of X, got {draws}")
    if X.numel() == 0:
        return X
    if X.dtype in tiles.SUM_DTYPES and contiguous_rows(X) and device_of(X) is not None:
        tiles.center_rows(X, draws, scale)
        return X
    return reference.center(X, draws, scale)
