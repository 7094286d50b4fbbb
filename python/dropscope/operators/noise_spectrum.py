"""Eigenpairs of the dropout noise through the Gram matrix of the gradients or through products, cross-validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dropscope.estimate import Estimate
from dropscope.factors import FactorBlock, Table
from dropscope.factors.eigen import Precision, leading_eigenpairs
from dropscope.operators import noise_statistics as statistics
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
        cross_validated: one for each pair; empty for fewer than 4 draws, or where products had to be used.
    """

    cross_validated: tuple[Estimate, ...] = ()

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.cross_validated:
            lines.append("  cross-validated  " + ", ".join(repr(estimate) for estimate in self.cross_validated))
        return "\n".join(lines)


def noise_eigenpairs(
    noise: GradientNoise, k: int, tol: float, seed: int, precision: Precision, cross_validate: bool, progress: bool
) -> NoiseEigenpairs:
    """See :meth:`GradientNoise.eigsh`."""
    table = noise.table
    if table.quiet or not gram_pays(table, k):
        pairs = eigsh(noise.dropout, k, "LA", tol, seed=seed, progress=progress)
        return NoiseEigenpairs(**vars(pairs))
    chunks = [chunk.blocks for chunk in table.chunks()]
    # The residual of a pair of Σ is that of its pair of the Gram matrix times √(λ₁/λ): a tenth leaves room to λ₁/100.
    found = leading_eigenpairs(chunks, table.draws, k, table.problem.dim, precision=precision, tol=0.1 * tol, seed=seed)
    scale = float(found.values[0].abs())
    converged = found.residuals <= tol * scale
    crossed = _cross_validated(table, k, tol, seed, precision) if cross_validate and table.draws >= 4 else ()
    return NoiseEigenpairs(
        values=found.values,
        vectors=found.vectors.to(noise.dropout.dtype),
        residuals=found.residuals,
        converged=converged,
        status=EigenStatus.CONVERGED if bool(converged.all()) else EigenStatus.ROUNDING,
        matvecs=1,
        scale=scale,
        tol=tol,
        which="LA",
        cross_validated=crossed,
    )


def gram_pays(table: Table, k: int) -> bool:
    """Whether forming the Gram matrix costs fewer operations than the products, and fits."""
    rows = len(table)
    rank = rows - table.n
    if k > rank or not table.complete or table.cache in ("recompute", "disk"):
        return False
    if rows * rows // 2 * torch.empty(0, dtype=table.problem.dtype).element_size() > table.budget:
        return False
    inner = 0
    for block in next(iter(table.chunks())).blocks:
        if isinstance(block, FactorBlock):
            T, d_in, d_out = block.B.shape[1], block.A.shape[2], block.B.shape[2]
            inner += min(T * T * (d_in + d_out), d_in * d_out)
        else:
            inner += sum(c.stop - c.start for c in block.columns)
    return rows * inner < 4 * table.problem.dim * max(TYPICAL_MATVECS, 2 * k)


def _cross_validated(table: Table, k: int, tol: float, seed: int, precision: Precision) -> tuple[Estimate, ...]:
    """Variance in each half of the draws along the eigenvectors of the other half."""
    M, n = table.draws, table.n
    halves = (slice(0, M // 2), slice(M // 2, M))
    counts = (M // 2, M - M // 2)
    if k > n * (counts[0] - 1):
        return ()
    sides = []
    for mine, other in ((0, 1), (1, 0)):
        chunks = [[block.take(M, halves[mine]) for block in chunk.blocks] for chunk in table.chunks()]
        found = leading_eigenpairs(chunks, counts[mine], k, table.problem.dim, precision=precision, tol=tol, seed=seed)
        del chunks
        Vt = found.vectors.T.contiguous()
        P = torch.cat([chunk.project(Vt).view(chunk.samples, M, k)[:, halves[other]] for chunk in table.chunks()])
        sides.append(statistics.direction_estimates(P, 1.0 / n**2))
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
