"""Leading eigenpairs of the dropout noise through the Gram matrix of its rows.

With G the rows g_im and C the projection that subtracts each sample's mean over its M draws, the covariance is
Σ̂ = c GᵀCG, c = n⁻²/(M-1). Its nonzero eigenvalues are those of c·CGGᵀC, and v = GᵀCu/√λ. The Gram matrix costs
(nM)²·Σ(d_in + d_out) flops once, a product with Σ̂ 4·nM·P: so this route wins while nM is below some 10⁴, and the
eigenvectors, one weighted sum each, then cost about as much as the Gram matrix itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.factors.blocks import Block, FactorBlock
from dropscope.kernels.products import multiply

Precision = Literal["full", "bf16"]
# Columns of a block: enough to fill the vector units, few enough that a product costs one read of the matrix.
_BLOCK = 16
# Rows and columns of a tile of the Gram matrix.
_TILE = 2048


class GramEigenpairs(NamedTuple):
    """Leading eigenpairs of Σ̂.

    values: float64 (k,), falling. vectors: (dim, k), orthonormal. residuals: float64 (k,), ‖Σ̂v - λv‖.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@torch.no_grad()
def leading_eigenpairs(
    chunks: Sequence[Sequence[Block]],
    draws: int,
    k: int,
    dim: int,
    *,
    precision: Precision = "full",
    tol: float = 1e-4,
    seed: int = 0,
) -> GramEigenpairs:
    """The k largest eigenvalues of Σ̂ = n⁻² Σ_i (M-1)⁻¹ Σ_m (g_im - ḡ_i)(g_im - ḡ_i)ᵀ and their eigenvectors.

    The Gram matrix is formed once, its eigenvectors come from block Lanczos, and two weighted sums of the gradients
    give the vectors and the product that their residuals are checked with.

    Args:
        chunks: the blocks of the rows of some samples each, in the order of the samples; every block must have a
            Gram matrix.
        draws: M ≥ 2; the M rows of a sample follow each other.
        k: number of pairs, at most n(M-1) and dim.
        dim: number of parameters.
        precision: ``"bf16"`` rounds the factors of linear maps, and the Gram matrix, to bfloat16: twice as fast where
            the CPU multiplies bfloat16 natively, in half the memory; Σ̂ is then perturbed by some 10⁻³ of its norm,
            which the residuals show.
        tol: the iteration stops at residuals of tol times the largest eigenvalue.
        seed: seed of the first block.

    Returns:
        The pairs. A residual is the larger of the one in the Gram matrix and the root mean square over the pairs that
        a true product with a random combination of them shows.

    Raises:
        ValueError: if k is out of range, or ``precision`` is unknown.
    """
    rows = sum(chunk[0].rows for chunk in chunks)
    rank = rows - rows // draws
    if not 1 <= k <= min(rank, dim):
        raise ValueError(f"leading_eigenpairs: k must be in 1..{min(rank, dim)}, got {k}")
    if precision not in ("full", "bf16"):
        raise ValueError(f"leading_eigenpairs: precision must be 'full' or 'bf16', got {precision!r}")
    rounded = _joined([[_rounded(b) for b in chunk] for chunk in chunks] if precision == "bf16" else chunks)
    scale = 1.0 / ((rows // draws) ** 2 * (draws - 1))
    dtype = _dtype(chunks)
    K = _Gram(rounded, draws, dtype, torch.bfloat16 if precision == "bf16" else dtype)
    values, U = _block_lanczos(K, k, tol, seed)
    residuals = _gram_residuals(K, values, U) * scale
    del K
    Vt = U.new_zeros(k, dim)
    _accumulate(rounded, U, Vt)
    Vt = _orthonormal_rows(Vt, values, seed)
    values *= scale
    signs = torch.where(torch.rand(k, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)
    mix = signs.to(values).unsqueeze(0)
    true = _product(chunks, draws, multiply(mix.to(Vt.dtype), Vt)).mul_(scale)
    found = float(true.sub_(multiply((mix * values).to(Vt.dtype), Vt)).norm()) / k**0.5
    return GramEigenpairs(values, Vt.T, residuals.clamp(min=found))


class _Gram:
    """CK of all rows, tile by tile on and below the diagonal; C subtracts each sample's mean over its draws.

    Centred before it is stored, so that rounding to bfloat16 acts on the noise and not on the mean gradient beside it.
    """

    def __init__(self, chunks: Sequence[Sequence[Block]], draws: int, dtype: torch.dtype, storage: torch.dtype) -> None:
        pieces = [piece for chunk in chunks for piece in _pieces(chunk, draws)]
        ends = list(itertools.accumulate(piece[0].rows for piece in pieces))
        self.at = [slice(end - piece[0].rows, end) for end, piece in zip(ends, pieces, strict=True)]
        self.rows, self.draws, self.dtype = ends[-1], draws, dtype
        self.device = next(iter(pieces[0][0].tensors().values())).device
        layers = [_layers(piece) for piece in pieces]
        self.tiles: dict[tuple[int, int], Tensor] = {}
        for j, i in itertools.combinations_with_replacement(range(len(pieces)), 2):
            tile = torch.zeros(pieces[i][0].rows, pieces[j][0].rows, dtype=dtype, device=self.device)
            kernels.gram_sum(layers[i], layers[j], tile)
            for mine, other in zip(pieces[i], pieces[j], strict=True):
                if not isinstance(mine, FactorBlock):
                    mine.add_gram(other, tile)
            self.tiles[i, j] = kernels.center(tile, draws).to(storage)

    def product(self, X: Tensor) -> Tensor:
        """CKX for contrasts X, CX = X."""
        out = torch.zeros_like(X)
        for (i, j), stored in self.tiles.items():
            tile = stored.to(self.dtype)
            out[self.at[i]] += multiply(tile, X[self.at[j]])
            if i != j:
                out[self.at[j]] += multiply(X[self.at[i]].T, tile).T
        return kernels.center(out, self.draws)


def _pieces(chunk: Sequence[Block], draws: int) -> list[Sequence[Block]]:
    """The chunk cut between samples, evenly, into pieces of about _TILE rows."""
    samples = chunk[0].rows // draws
    count = -(-chunk[0].rows // _TILE)
    if count == 1:
        return [chunk]
    size = -(-samples // count)
    return [[_samples(block, samples, slice(i, i + size)) for block in chunk] for i in range(0, samples, size)]


def _samples(block: Block, samples: int, chosen: slice) -> Block:
    """The rows of some of the block's samples."""
    parts = {name: t.view(samples, -1, *t.shape[1:])[chosen].flatten(0, 1) for name, t in block.tensors().items()}
    return block.replace(parts)


def _layers(chunk: Sequence[Block]) -> list[tuple[Tensor, Tensor, bool]]:
    return [(b.A, b.B, b.bias is not None) for b in chunk if isinstance(b, FactorBlock)]


def _dtype(chunks: Sequence[Sequence[Block]]) -> torch.dtype:
    """Of sums."""
    return torch.promote_types(next(iter(chunks[0][0].tensors().values())).dtype, torch.float32)


def _joined(chunks: Sequence[Sequence[Block]]) -> Sequence[Sequence[Block]]:
    """One chunk in place of many small ones, whose products would be small; only where their shapes agree."""
    if len(chunks) == 1 or min(chunk[0].rows for chunk in chunks) >= 512:
        return chunks
    shapes = {tuple((len(t) / b.rows, t.shape[1:]) for b in chunk for t in b.tensors().values()) for chunk in chunks}
    if len(shapes) > 1:
        return chunks
    columns = zip(*chunks, strict=True)
    return [[c[0].replace({n: torch.cat([b.tensors()[n] for b in c]) for n in c[0].tensors()}) for c in columns]]


def _rounded(block: Block) -> Block:
    if not isinstance(block, FactorBlock):
        return block
    return FactorBlock(block.A.bfloat16(), block.B.bfloat16(), block.weight, block.bias)


def _accumulate(chunks: Sequence[Sequence[Block]], S: Tensor, out: Tensor) -> None:
    start = 0
    for chunk in chunks:
        rows = S[start : start + chunk[0].rows].contiguous()
        for block in chunk:
            block.accumulate(rows, out)
        start += chunk[0].rows


def _product(chunks: Sequence[Sequence[Block]], draws: int, Vt: Tensor) -> Tensor:
    """(GᵀCG V)ᵀ."""
    out = torch.zeros_like(Vt)
    for chunk in chunks:
        S = Vt.new_zeros(chunk[0].rows, len(Vt))
        for block in chunk:
            block.project(Vt, S)
        kernels.center(S, draws)
        for block in chunk:
            block.accumulate(S, out)
    return out


def _block_lanczos(K: _Gram, k: int, tol: float, seed: int) -> tuple[Tensor, Tensor]:
    """Leading k eigenvalues, float64, and eigenvectors (N, k) of CKC, by block Lanczos with full orthogonalisation.

    The basis is small beside K, so it is kept orthogonal twice over and never restarted; it ends at the latest when
    it spans all contrasts of the draws. A block that adds nothing is replaced by a random one.
    """
    N, draws, generator = K.rows, K.draws, torch.Generator().manual_seed(seed)
    rank = N - N // draws
    basis, X = (torch.zeros(shape, dtype=K.dtype, device=K.device) for shape in ((0, N), (N, 0)))
    T = torch.zeros(0, 0, dtype=torch.float64, device=K.device)
    while True:
        if X.shape[1] == 0:
            X = torch.randn(N, max(_BLOCK, k + 6), generator=generator, dtype=K.dtype).to(K.device)
            X = _next_block(basis, kernels.center(X, draws), draws)
        X = X[:, : rank - len(basis)]
        basis, width = torch.cat((basis, X.T)), X.shape[1]
        Y = K.product(X)
        coefficients = multiply(basis, Y)
        T = _bordered(T, coefficients.double())
        Y = Y - multiply(basis.T, coefficients)
        X = _next_block(basis, Y, draws, float(T.diagonal().abs().max()))
        if len(T) < min(rank, max(k + 1, 4 * _BLOCK)) and X.shape[1]:
            continue
        values, S = torch.linalg.eigh(T)
        values, S = values[-k:].flip(0), S[:, -k:].flip(1)
        residuals = ((X.double().T @ Y.double()) @ S[-width:]).norm(dim=0)
        if len(T) == rank or (len(T) >= k and float(residuals.max()) <= tol * float(values[0])):
            return values, multiply(basis.T, S.to(K.dtype))


def _next_block(basis: Tensor, Y: Tensor, draws: int, scale: float = 0.0) -> Tensor:
    """Orthonormal contrasts that span Y and are orthogonal to the basis, to rounding however small Y is."""
    X = _orthonormal(Y, scale)
    if X.shape[1] == 0:
        return X
    return _orthonormal(kernels.center(X - multiply(basis.T, multiply(basis, X)), draws))


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


def _gram_residuals(K: _Gram, values: Tensor, U: Tensor) -> Tensor:
    """‖GᵀCGv - λv‖ for v = GᵀCu/√λ: the norm of GᵀCr/√λ, r = CKCu - λu. Pairs of no variance have none."""
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
    inverse_root: Tensor = (W * squares.rsqrt()) @ W.T * d
    for part in parts:  # in place: a second set of vectors would be the most memory of all
        part.copy_(multiply(inverse_root.to(Vt.dtype), part))
    return Vt
