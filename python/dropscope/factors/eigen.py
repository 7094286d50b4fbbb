"""Leading eigenpairs of the dropout noise through the Gram matrix of its rows.

With G the rows g_im, C the projection that subtracts each sample's mean over its M_i draws and D = diag (M_i-1)^-½,
the covariance is Σ̂ = n⁻² GᵀCD²CG. Its nonzero eigenvalues are those of n⁻²·DCGGᵀCD, and v = GᵀCDu/√λ. With N rows
the Gram matrix costs N²·Σ(d_in + d_out) flops once, a product with Σ̂ 4·N·P: so this route wins while N is below some
10⁴, and the eigenvectors, one weighted sum each, then cost about as much as the Gram matrix itself.

In a trained network most samples are quiet: half of them may carry a thousandth of the trace. They are left out of the
Gram matrix up to a share of the trace, on the guess that their noise has the spectrum of the rest and so moves no
eigenpair by more than that share of the largest. Products with what was left out then measure by how much it does,
and where the guess was wrong only samples are left out whose traces add up to less than the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.factors.blocks import Block, FactorBlock
from dropscope.factors.centred_gram import PRECISIONS, CentredGram, Precision, samples_of
from dropscope.factors.chunk import Chunk, joined
from dropscope.kernels.products import multiply

Verify = Literal["each", "together"]
# What may add to a residual, as shares of the tolerance: the iteration, and samples that are left out. The residual of
# a pair of Σ̂ is that of its pair of the Gram matrix times √(λ₁/λ): a tenth leaves room to λ₁/100.
ITERATION_SHARE, QUIET_SHARE = 0.1, 0.25
# Columns of a block: enough to fill the vector units, few enough that a product costs one read of the matrix.
_BLOCK = 16


class GramEigenpairs(NamedTuple):
    """Leading eigenpairs of Σ̂.

    values: float64 (k,), falling. vectors: (dim, k), orthonormal. residuals: float64 (k,), ‖Σ̂v - λv‖.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@torch.no_grad()
def leading_eigenpairs(
    chunks: Sequence[Chunk],
    k: int,
    dim: int,
    *,
    precision: Precision = "full",
    verify: Verify = "each",
    tol: float = 1e-4,
    seed: int = 0,
) -> GramEigenpairs:
    """The k largest eigenvalues of Σ̂ = n⁻² Σ_i (M_i-1)⁻¹ Σ_m (g_im - ḡ_i)(g_im - ḡ_i)ᵀ and their eigenvectors.

    The Gram matrix is formed once, its eigenvectors come from block Lanczos, a weighted sum of the gradients gives each
    vector, and products with Σ̂ the residuals.

    Args:
        chunks: the rows of all samples; every block must have a Gram matrix, every M_i be at least 2.
        k: number of pairs, at most Σ(M_i-1) and dim.
        dim: number of parameters.
        precision: ``"bf16"`` rounds the factors of linear maps, and the Gram matrix, to bfloat16: twice as fast where
            the CPU multiplies bfloat16 natively, in half the memory; Σ̂ is then perturbed by some 10⁻³ of its norm,
            which the residuals show. ``"int8"`` rounds them to 8-bit integers, :mod:`dropscope.kernels.integers`, for
            the Gram matrix alone: its products are four times as fast where the CPU has units for them, and Σ̂ is
            perturbed by some 3·10⁻⁴ of its norm; factors of several time steps are not rounded.
        verify: ``"each"``: one product for each pair, after which values and residuals are those of a Rayleigh-Ritz
            step on Σ̂ itself; ``"together"``: one product in all, with a random combination of the pairs.
        tol: asked of the residuals, relative to the largest eigenvalue.
        seed: seed of the first block.

    Returns:
        The pairs. Values below rounding of the largest are 0, with vectors orthogonal to the others. Under
        ``"together"`` a residual is the larger of the one in the Gram matrix and the root mean square over the pairs
        that the combination shows.

    Raises:
        ValueError: if k is out of range, or an option is unknown.
    """
    rank = sum(chunk.rows - chunk.samples for chunk in chunks)
    if not 1 <= k <= min(rank, dim):
        raise ValueError(f"leading_eigenpairs: k must be in 1..{min(rank, dim)}, got {k}")
    if precision not in PRECISIONS:
        raise ValueError(f"leading_eigenpairs: precision must be 'full', 'bf16' or 'int8', got {precision!r}")
    if verify not in ("each", "together"):
        raise ValueError(f"leading_eigenpairs: verify must be 'each' or 'together', got {verify!r}")
    traces = [_traces(chunk) for chunk in chunks]
    quiet = QUIET_SHARE * tol * float(sum(t.sum() for t in traces))
    loud, rest = _parted(chunks, traces, quiet, k)
    found, missed = _pairs(loud, rest, k, dim, precision, verify, tol, seed)
    if missed > 0.5 * tol * float(found.values[0]):
        loud, rest = _parted(chunks, traces, QUIET_SHARE * tol * float(found.values[0]), k)
        found, _ = _pairs(loud, rest, k, dim, precision, verify, tol, seed)
    scale = 1.0 / sum(chunk.samples for chunk in chunks) ** 2
    return GramEigenpairs(found.values * scale, found.vectors, found.residuals * scale)


def _pairs(
    loud: Sequence[Chunk],
    rest: Sequence[Chunk],
    k: int,
    dim: int,
    precision: Precision,
    verify: Verify,
    tol: float,
    seed: int,
) -> tuple[GramEigenpairs, float]:
    """Pairs of n²Σ̂ from the Gram matrix of some samples, and the most that the rest adds to a residual."""
    dtype = _dtype(loud)
    rounded = joined([c.replace(_rounded(b) for b in c.blocks) for c in loud] if precision == "bf16" else loud)
    K = CentredGram(rounded, dtype, precision)
    values, U = _block_lanczos(K, k, ITERATION_SHARE * tol, seed)
    residuals = _gram_residuals(K, values, U)
    segments = K.segments
    del K
    for rows, _, weight in segments:
        U[rows] *= weight
    Vt = U.new_zeros(k, dim)
    _accumulate(rounded, U, Vt)
    Vt, values = _orthonormal_rows(Vt, values, seed), torch.where(_empty(values, dtype), 0.0, values)
    if precision != "bf16":
        loud = rounded
    del rounded
    if verify == "each":
        image = _product(rest, Vt)
        missed = float(image.norm(dim=1).max())
        _product(loud, Vt, image)
        small = multiply(Vt, image.T).double()
        order, W = torch.linalg.eigh((small + small.T) / 2)
        values, W = order.flip(0), W.flip(1).T.to(dtype)
        _rotate(W, Vt)
        _rotate(W, image)
        residuals = torch.stack(
            [(row - value * v).norm() for row, value, v in zip(image, values.to(dtype), Vt, strict=True)]
        )
        values = torch.where(_empty(values, dtype), 0.0, values)
        return GramEigenpairs(values, Vt.T, residuals.double()), missed
    signs = torch.where(torch.rand(k, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)
    mix = signs.to(values).unsqueeze(0)
    probe = multiply(mix.to(Vt.dtype), Vt)
    image = _product(rest, probe)
    missed = float(image.norm()) / k**0.5
    _product(loud, probe, image)
    found = float(image.sub_(multiply((mix * values).to(Vt.dtype), Vt)).norm()) / k**0.5
    return GramEigenpairs(values, Vt.T, residuals.clamp(min=found)), missed


def _traces(chunk: Chunk) -> Tensor:
    """tr Ĉ_i of every sample, float64."""
    gram = chunk.sample_gram()
    M = chunk.draws
    return (gram.diagonal(dim1=1, dim2=2).sum(1) - gram.sum((1, 2)) / M).clamp_min(0.0) / (M - 1)


def _parted(chunks: Sequence[Chunk], traces: Sequence[Tensor], quiet: float, k: int) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks without the samples whose traces add up to at most ``quiet``, and those samples.

    Some rank is kept beyond k, so that few pairs of many equal samples are found as well.
    """
    every = torch.cat([t.cpu() for t in traces])
    order = every.argsort()
    drop = int(torch.searchsorted(every[order].cumsum(0), quiet, right=True))
    loud = torch.ones(len(every), dtype=torch.bool)
    loud[order[:drop]] = False
    parts = torch.split(loud, [chunk.samples for chunk in chunks])
    rank = sum(int(part.sum()) * (chunk.draws - 1) for part, chunk in zip(parts, chunks, strict=True))
    if drop == 0 or rank < 4 * k:
        return list(chunks), []
    kept: list[Chunk] = []
    rest: list[Chunk] = []
    for chunk, part in zip(chunks, parts, strict=True):
        for chosen, side in ((part, kept), (~part, rest)):
            if bool(chosen.all()):
                side.append(chunk)
            elif bool(chosen.any()):
                index = chosen.nonzero().squeeze(1)
                blocks = (samples_of(block, chunk.samples, index.to(traces[0].device)) for block in chunk.blocks)
                side.append(Chunk(chunk.ids[index], chunk.draws, tuple(blocks)))
    return kept, joined(rest)


def _dtype(chunks: Sequence[Chunk]) -> torch.dtype:
    """Of sums."""
    return torch.promote_types(next(iter(chunks[0].blocks[0].tensors().values())).dtype, torch.float32)


def _rounded(block: Block) -> Block:
    if not isinstance(block, FactorBlock):
        return block
    return block.to(torch.bfloat16)


def _accumulate(chunks: Sequence[Chunk], S: Tensor, out: Tensor) -> None:
    start = 0
    for chunk in chunks:
        chunk.accumulate(S[start : (start := start + chunk.rows)], out)


def _product(chunks: Sequence[Chunk], Vt: Tensor, out: Tensor | None = None) -> Tensor:
    """(GᵀCD²CG V)ᵀ, added to out."""
    out = torch.zeros_like(Vt) if out is None else out
    for chunk in chunks:
        S = chunk.project(Vt)
        chunk.accumulate(kernels.center(S, chunk.draws, 1.0 / (chunk.draws - 1)), out)
    return out


def _block_lanczos(K: CentredGram, k: int, tol: float, seed: int) -> tuple[Tensor, Tensor]:
    """Leading k eigenvalues, float64, and eigenvectors (N, k) of DCGGᵀCD, by block Lanczos with full orthogonalisation.

    The basis is small beside K, so it is kept orthogonal twice over and never restarted; it ends at the latest when
    it spans all contrasts of the draws. A block that adds nothing is replaced by a random one.
    """
    N, rank, generator = K.rows, K.rank, torch.Generator().manual_seed(seed)
    basis, X = (torch.zeros(shape, dtype=K.dtype, device=K.device) for shape in ((0, N), (N, 0)))
    T = torch.zeros(0, 0, dtype=torch.float64, device=K.device)
    while True:
        if X.shape[1] == 0:
            X = torch.randn(N, max(_BLOCK, k + 6), generator=generator, dtype=K.dtype).to(K.device)
            X = _next_block(K, basis, K.center(X))
        X = X[:, : rank - len(basis)]
        basis, width = torch.cat((basis, X.T)), X.shape[1]
        Y = K.product(X)
        coefficients = multiply(basis, Y)
        T = _bordered(T, coefficients.double())
        Y = Y - multiply(basis.T, coefficients)
        X = _next_block(K, basis, Y, float(T.diagonal().abs().max()))
        if len(T) < min(rank, max(k + 1, 4 * _BLOCK)) and X.shape[1]:
            continue
        values, S = torch.linalg.eigh(T)
        values, S = values[-k:].flip(0), S[:, -k:].flip(1)
        residuals = ((X.double().T @ Y.double()) @ S[-width:]).norm(dim=0)
        if len(T) == rank or (len(T) >= k and float(residuals.max()) <= tol * float(values[0])):
            return values, multiply(basis.T, S.to(K.dtype))


def _next_block(K: CentredGram, basis: Tensor, Y: Tensor, scale: float = 0.0) -> Tensor:
    """Orthonormal contrasts that span Y and are orthogonal to the basis, to rounding however small Y is."""
    X = _orthonormal(Y, scale)
    if X.shape[1] == 0:
        return X
    return _orthonormal(K.center(X - multiply(basis.T, multiply(basis, X))))


def _bordered(T: Tensor, column: Tensor) -> Tensor:
    """T with a block column and its mirror image appended."""
    old, new = len(T), len(column) - len(T)
    out = column.new_zeros(old + new, old + new)
    out[:old, :old] = T
    out[:, old:] = column
    out[old:, :old] = column[:old].T
    out[old:, old:] = (column[old:] + column[old:].T) / 2
    return out


def _orthonormal(Y: Tensor, scale: float = 0.0) -> Tensor:
    """An orthonormal basis (N, r) of the columns of Y; directions below rounding of ``scale`` are dropped.

    The inner products show directions down to 10⁻⁶ of the largest, so smaller ones are sought in what is left.
    """
    wide, parts = Y.double(), [Y.new_zeros(len(Y), 0, dtype=torch.float64)]
    floor = (100.0 * torch.finfo(Y.dtype).eps) ** 2 * max(scale**2, float(wide.square().sum(0).max()))
    while True:
        squares, W = torch.linalg.eigh(wide.T @ wide)
        keep = squares > max(floor, 1e-12 * float(squares[-1]))
        if not keep.any():
            break
        parts.append(wide @ (W[:, keep] / squares[keep].sqrt()))
        if floor >= 1e-12 * float(squares[-1]):
            break
        wide = wide - parts[-1] @ (parts[-1].T @ wide)
    if len(parts) < 3:
        return parts[-1].to(Y.dtype)
    X = torch.cat(parts, 1)
    squares, W = torch.linalg.eigh(X.T @ X)
    return multiply(X, W * squares.rsqrt()).to(Y.dtype)


def _gram_residuals(K: CentredGram, values: Tensor, U: Tensor) -> Tensor:
    """‖Σ̂v - λv‖n² for v = GᵀCDu/√λ: the norm of GᵀCDr/√λ, r = DCGGᵀCDu - λu. Pairs of no variance have none."""
    r = (K.product(U).double() - U.double() * values).to(K.dtype)
    squares = (r.double() * K.product(r).double()).sum(0).clamp(min=0.0)
    empty = _empty(values, K.dtype)
    return torch.where(empty, 0.0, squares / torch.where(empty, 1.0, values)).sqrt()


def _empty(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Which eigenvalues are zero to rounding."""
    return values <= 1e2 * torch.finfo(dtype).eps * values[0]


def _orthonormal_rows(Vt: Tensor, values: Tensor, seed: int) -> Tensor:
    """Rows made orthonormal, each changed as little as rounding asks; those of no variance become random."""
    empty = _empty(values, Vt.dtype)
    if empty.any():
        Vt[empty] = torch.randn(int(empty.sum()), Vt.shape[1], generator=torch.Generator().manual_seed(seed)).to(Vt)
        basis: Tensor = torch.linalg.qr(Vt.T)[0]
        return basis.T
    G = Vt.new_zeros(len(Vt), len(Vt), dtype=torch.float64)
    parts = [Vt[:, start : start + (1 << 13)] for start in range(0, Vt.shape[1], 1 << 13)]
    for part in parts:
        G += multiply(part, part.T).double()
    d = G.diagonal().rsqrt()
    squares, W = torch.linalg.eigh(d[:, None] * G * d)
    _rotate(((W * squares.rsqrt()) @ W.T * d).to(Vt.dtype), Vt)
    return Vt


def _rotate(W: Tensor, Vt: Tensor) -> None:
    """Vt <- W Vt by column blocks, in place: a second set of vectors would be the most memory of all."""
    for start in range(0, Vt.shape[1], 1 << 13):
        part = Vt[:, start : start + (1 << 13)]
        part.copy_(multiply(W, part))
