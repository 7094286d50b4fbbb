"""Eigenpairs of the dropout noise through the Gram matrix of the gradients or through products, cross-validated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope.estimate import Estimate
from dropscope.factors import FactorBlock, Table
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral import Eigenpairs, EigenStatus, eigsh

if TYPE_CHECKING:
    from dropscope.operators.gradient_noise import GradientNoise

# Products that Lanczos needs for a handful of pairs: what the choice between Gram matrix and products reckons with.
TYPICAL_MATVECS = 60


@dataclass(frozen=True, repr=False)
class NoiseEigenpairs(Eigenpairs):
    """Eigenpairs of the estimated covariance, with what their values are worth.

    The eigenvalues of an estimate are biased upwards: its vectors have adapted to the draws that it was made from. A
    cross-validated value takes the vectors from one half of the draws and the variance from the other, both ways, and
    is biased downwards. The two bracket the truth unless heavy_tailed.

    Attributes:
        cross_validated: one for each pair; empty for fewer than 4 draws.
    """

    cross_validated: tuple[Estimate, ...] = ()

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.cross_validated:
            lines.append("  cross-validated  " + ", ".join(repr(estimate) for estimate in self.cross_validated))
        return "\n".join(lines)


class _Dense(SymmetricOperator):
    """A symmetric matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim, self.dtype, self.device, self.blocks = len(matrix), matrix.dtype, matrix.device, {}

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V


def noise_eigenpairs(noise: GradientNoise, k: int, tol: float, seed: int, progress: bool) -> NoiseEigenpairs:
    """See :meth:`GradientNoise.eigsh`."""
    if not noise.table.quiet and gram_pays(noise.table, k):
        found = _through_gram(noise, k, tol, seed, progress)
        if found is not None:
            return found
    pairs = eigsh(noise.dropout, k, "LA", tol, seed=seed, progress=progress)
    return NoiseEigenpairs(**vars(pairs))


def gram_pays(table: Table, k: int) -> bool:
    """Whether forming the Gram matrix costs fewer operations than the products, and fits."""
    rows = len(table)
    if k > rows or not table.complete or table.cache == "recompute":
        return False
    if 3 * rows * rows * 4 > table.budget:
        return False
    chunk = next(iter(table.chunks()))
    inner = 0
    for block in chunk.blocks:
        if isinstance(block, FactorBlock):
            T = block.B.shape[1]
            inner += min(T * T * (block.A.shape[2] + block.B.shape[2]), block.A.shape[2] * block.B.shape[2])
        else:
            inner += sum(c.stop - c.start for c in block.columns)
    return rows * inner < 4 * table.problem.dim * max(TYPICAL_MATVECS, 2 * k)


def _through_gram(noise: GradientNoise, k: int, tol: float, seed: int, progress: bool) -> NoiseEigenpairs | None:
    """Pairs from the Gram matrix K = XXᵀ of the centred rows; None if fewer than k eigenvalues are distinguishable."""
    table, n, M = noise.table, noise.n, noise.draws
    raw = table.gram()
    K = _centred(raw, n, list(range(M)), M)
    # The residual of a pair of Σ is that of its pair of K times √(λ₁/λ): a tenth leaves room down to λ₁/100.
    small = eigsh(_Dense(K), k, "LA", 0.1 * tol, seed=seed, progress=progress)
    del K
    floor = len(raw) * torch.finfo(raw.dtype).eps * float(small.values[0])
    if not float(small.values[-1]) > floor:
        return None
    # v = Xᵀu/√λ, and ‖Σv − λv‖ = ‖Xᵀ(Ku − λu)‖/√λ.
    scale = 1.0 / (n * math.sqrt(M - 1) * small.values.sqrt())
    S = statistics.centre(small.vectors.view(n, M, k), 1).reshape(n * M, k) * scale.to(raw.dtype)
    out = torch.zeros(k, table.problem.dim, dtype=raw.dtype, device=raw.device)
    for chunk in table.chunks():
        chunk.accumulate(S[chunk.start * M : chunk.start * M + chunk.rows], out)
    vectors = torch.linalg.qr(out.T).Q
    vectors = vectors * torch.sign((vectors * out.T).sum(0))
    residuals = small.residuals * (small.scale / small.values).sqrt()
    converged = residuals <= tol * small.scale
    status = EigenStatus.CONVERGED if bool(converged.all()) else small.status
    if status is EigenStatus.CONVERGED and not bool(converged.all()):
        status = EigenStatus.ROUNDING
    pairs = replace(
        small,
        vectors=vectors.to(noise.dropout.dtype),
        residuals=residuals,
        converged=converged,
        status=status,
        tol=tol,
    )
    return NoiseEigenpairs(**vars(pairs), cross_validated=_cross_validated(raw, n, M, k, tol, seed))


def _centred(raw: Tensor, n: int, draws: list[int], M: int) -> Tensor:
    """Gram matrix of (g_im − ḡ_i)/(n √(M'−1)) over a subset of M' draws."""
    count = len(draws)
    X = raw.view(n, M, n, M)
    X = X.clone() if count == M else X[:, draws][:, :, :, draws]
    X -= X.mean(1, keepdim=True)
    X -= X.mean(3, keepdim=True)
    X *= 1.0 / (n * n * (count - 1))
    return X.view(n * count, n * count)


def _cross_validated(raw: Tensor, n: int, M: int, k: int, tol: float, seed: int) -> tuple[Estimate, ...]:
    """Variance in each half of the draws along the eigenvectors of the other half."""
    if M < 4:
        return ()
    halves = (list(range(M // 2)), list(range(M // 2, M)))
    sides = []
    for mine, other in (halves, halves[::-1]):
        K = _centred(raw, n, mine, M)
        pairs = eigsh(_Dense(K), min(k, len(K)), "LA", tol, seed=seed)
        if not float(pairs.values[-1]) > 0.0:
            return ()
        U = statistics.centre(pairs.vectors.view(n, len(mine), -1), 1).reshape(n * len(mine), -1)
        across = raw.view(n, M, n, M)[:, other][:, :, :, mine].reshape(n * len(other), n * len(mine))
        P = across @ (U / (n * math.sqrt(len(mine) - 1) * pairs.values.sqrt()).to(U.dtype))
        sides.append(statistics.direction_estimates(P.view(n, len(other), -1), 1.0 / n**2))
    return tuple(mean_estimate(one, two) for one, two in zip(*sides, strict=True))


def mean_estimate(one: Estimate, two: Estimate) -> Estimate:
    """Mean of two estimates of a variance from independent draws along directions that depend on the other's draws."""
    value = (one.value + two.value) / 2
    if "no_error" in (one.status, two.status):
        return Estimate(value, math.nan, math.nan, "no_error", scale=True)
    stderr = math.hypot(one.stderr, two.stderr) / 2
    if stderr == 0.0:
        return Estimate(value, 0.0, math.inf, "ok", scale=True)
    dof = 2.0 * (value / stderr) ** 2
    return Estimate(value, stderr, dof, "ok" if dof >= statistics.MIN_DOF else "heavy_tailed", scale=True)
