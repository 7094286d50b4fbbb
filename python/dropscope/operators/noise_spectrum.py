"""Eigenpairs of the dropout noise through the Gram matrix of the gradients or through products, cross-validated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dropscope import _files
from dropscope.estimate import Estimate
from dropscope.factors import Chunk, FactorBlock, Table
from dropscope.factors.centred_gram import Precision
from dropscope.factors.eigen import Verify, leading_eigenpairs
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.covariance import work_dtype
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
        cross_validated: one for each pair; empty if no sample has 4 draws, or where products had to be used.
    """

    cross_validated: tuple[Estimate, ...] = ()

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.cross_validated:
            lines.append("  cross-validated  " + ", ".join(repr(estimate) for estimate in self.cross_validated))
        return "\n".join(lines)

    def _more(self) -> dict[str, Any]:
        return {"cross_validated": self.cross_validated}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoiseEigenpairs:
        """Read what :meth:`save` wrote, onto the CPU; the cross-validated values too, where it has any."""
        written = _files.read_arrays(path)[1].get("cross_validated", [])
        crossed = []
        for given in written:
            # JSON has no numbers for what is not finite: no error is NaN, an exact one has infinitely many degrees.
            empty = math.nan if given["stderr"] is None else math.inf
            finite: dict[str, Any] = {name: empty if part is None else part for name, part in given.items()}
            crossed.append(Estimate(**finite))
        return cls(**{**vars(Eigenpairs.load(path)), "cross_validated": tuple(crossed)})


def noise_eigenpairs(
    noise: GradientNoise,
    k: int,
    tol: float,
    seed: int,
    *,
    precision: Precision,
    verify: Verify,
    cross_validate: bool,
    progress: bool,
) -> NoiseEigenpairs:
    """See :meth:`GradientNoise.eigsh`."""
    table = noise.table
    if table.quiet or not gram_pays(table, k):
        return _with_rank(NoiseEigenpairs(**vars(eigsh(noise.dropout, k, "LA", tol, seed=seed, progress=progress))))
    chunks = list(table.chunks())
    found = leading_eigenpairs(chunks, k, table.problem.dim, precision=precision, verify=verify, tol=tol, seed=seed)
    scale = float(found.values[0].abs())
    converged = found.residuals <= tol * scale
    crossed = _cross_validated(chunks, k, table.problem.dim, tol, seed, precision) if cross_validate else ()
    pairs = NoiseEigenpairs(
        values=found.values,
        vectors=found.vectors.to(noise.dropout.dtype),
        residuals=found.residuals,
        converged=converged,
        status=EigenStatus.CONVERGED if bool(converged.all()) else EigenStatus.ROUNDING,
        matvecs=k if verify == "each" else 1,
        scale=scale,
        tol=tol,
        which="LA",
        cross_validated=crossed,
    )
    return _with_rank(pairs)


def _with_rank(pairs: NoiseEigenpairs) -> NoiseEigenpairs:
    """Eigenvalues that are rounding of the largest are zeros, and the status says that the rank was met."""
    eps = torch.finfo(work_dtype(pairs.vectors.dtype)).eps  # of the sums: rounded vectors leave the values alone
    zero = pairs.values <= 1e2 * eps * float(pairs.values.max())
    if not bool(zero.any()) or pairs.status is not EigenStatus.CONVERGED:
        return pairs
    return replace(pairs, values=torch.where(zero, 0.0, pairs.values), status=EigenStatus.RANK)


def gram_pays(table: Table, k: int) -> bool:
    """Whether forming the Gram matrix costs fewer operations than the products, and fits."""
    rows = len(table)
    rank = rows - table.n
    if k > min(rank, table.problem.dim) or not table.complete or table.cache in ("recompute", "disk"):
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


def _cross_validated(
    chunks: Sequence[Chunk], k: int, dim: int, tol: float, seed: int, precision: Precision
) -> tuple[Estimate, ...]:
    """Variance in each half of the draws along the eigenvectors of the other half.

    Samples of fewer than 4 draws have no halves: the vectors do without them, and all their draws count in the
    variance, of which the vectors are then independent.
    """
    n = sum(chunk.samples for chunk in chunks)
    halved = [chunk.halves() for chunk in chunks if chunk.draws >= statistics.MIN_DRAWS_FOR_ERROR]
    others = [chunk for chunk in chunks if chunk.draws < statistics.MIN_DRAWS_FOR_ERROR]
    if k > sum(half[0].rows - half[0].samples for half in halved):
        return ()
    sides = []
    for mine in (0, 1):
        found = leading_eigenpairs(
            [half[mine] for half in halved], k, dim, precision=precision, verify="together", tol=tol, seed=seed
        )
        Vt = found.vectors.T.contiguous()
        rest = [half[1 - mine] for half in halved] + others
        projections = [chunk.project(Vt).view(chunk.samples, chunk.draws, k) for chunk in rest]
        sides.append(statistics.direction_estimates(projections, 1.0 / n**2))
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
