"""One face for everything an analysis takes as noise: sampled dropout noise, collected data, or an exact operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from dropscope.analyses.noise_data import NoiseData
from dropscope.estimate import Estimate
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator
from dropscope.problem import Problem

if TYPE_CHECKING:
    from dropscope.operators.gradient_noise import GradientNoise
    from dropscope.spectral import Eigenpairs

Noise: TypeAlias = "GradientNoise | NoiseData | SymmetricOperator"
# Of a delete-a-group jackknife over rows: enough for an error of the error of a tenth.
GROUPS = 50


@dataclass(frozen=True)
class NoiseSource:
    """A covariance Σ that is known exactly, by products.

    Attributes:
        operator: products with Σ.
    """

    operator: SymmetricOperator

    def along(self, V: Tensor) -> list[Estimate]:
        """vᵀΣv for each unit column v of V, (dim, k)."""
        values: Tensor = (V.double() * (self.operator @ V).double()).sum(0)
        return [Estimate(value, 0.0, scale=True) for value in values.tolist()]

    def leading(self, k: int, tol: float, seed: int, progress: bool) -> Eigenpairs:
        """The k leading eigenpairs, by the noise's own route where it has one."""
        from dropscope.spectral import eigsh

        return eigsh(self.operator, k, which="LA", tol=tol, seed=seed, progress=progress)

    @property
    def trace(self) -> Estimate | None:
        """Tr Σ with its error; None when only products are known."""
        return None

    def log_covariance(self, V: Tensor, weights: Tensor) -> tuple[Tensor, int]:  # noqa: ARG002
        """Covariance of the errors that sampling gives to three logarithms, and its degrees of freedom.

        The three are Σ_k w_k v_kᵀΣ̂v_k, Tr Σ̂ and ‖VᵀΣ̂V‖_F². They share masks, so that their ratios are known far better
        than each; the covariance is a jackknife.

        Args:
            V: unit columns (dim, k).
            weights: w, (k,).

        Returns:
            The (3, 3) matrix, zero for an exact operator and NaN where unknown, and its degrees of freedom.
        """
        return torch.zeros(3, 3, dtype=torch.float64), 10**9

    @property
    def square_bias(self) -> float:
        """E‖Σ̂‖_F² - ‖Σ‖_F² of a sampled Σ̂; 0 where it is unknown."""
        return 0.0


@dataclass(frozen=True)
class SampledSource(NoiseSource):
    """Dropout noise estimated from M masks for every sample.

    Attributes:
        sampled: the noise behind the operator.
    """

    sampled: GradientNoise

    def along(self, V: Tensor) -> list[Estimate]:
        """vᵀΣv with errors from the draws of every sample."""
        return self.sampled.variance_along(V)

    def leading(self, k: int, tol: float, seed: int, progress: bool) -> Eigenpairs:  # noqa: ARG002
        """The k leading eigenpairs, by Gram matrix or products."""
        return self.sampled.eigsh(k)

    @property
    def trace(self) -> Estimate | None:
        """Tr Σ with its error."""
        return self.sampled.trace

    def log_covariance(self, V: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """See :meth:`NoiseSource.log_covariance`.

        The jackknife is over the draws of every sample, whose variances add, linear in what a draw left out changes.
        Satterthwaite's degrees of freedom of the three, the fewest.
        """
        if self.sampled.table.quiet:
            return super().log_covariance(V, weights)
        chunks = list(self.sampled.table.chunks())
        if max(chunk.draws for chunk in chunks) < 3:
            return torch.full((3, 3), math.nan, dtype=torch.float64), 0
        Vt = V.T.contiguous()
        projections = [chunk.project(Vt).view(chunk.samples, chunk.draws, -1).double() for chunk in chunks]
        projections = [P - P.mean(1, keepdim=True) for P in projections]
        norms = [_squared_deviations(chunk.sample_gram()) for chunk in chunks]
        Ms = [chunk.draws for chunk in chunks]
        parts = zip(projections, Ms, strict=True)
        Sigma = sum(torch.einsum("imk,iml->kl", P, P) / (M - 1) for P, M in parts)
        assert isinstance(Sigma, Tensor)
        values, errors, squares = Sigma.new_zeros(3), Sigma.new_zeros(3, 3), Sigma.new_zeros(3)
        for P, norm, M in zip(projections, norms, Ms, strict=True):
            # What x_m xᵀ_m adds to each of the three, the last linearised.
            q = torch.stack([P.square() @ weights.to(P), norm, 2 * ((P @ Sigma) * P).sum(2)], 2)
            values += q.sum((0, 1)) / (M - 1)
            if M < 3:
                continue
            # Deviations sum to zero, so leaving out draw m takes (1 + 1/(M-1)) x_m x_mᵀ from the sum of squares.
            moved = (q.mean(1, keepdim=True) - q) * (M / ((M - 1) * (M - 2)))
            each = torch.einsum("ima,imb->iab", moved, moved) * ((M - 1) / M)
            errors += each.sum(0)
            squares += each.diagonal(dim1=1, dim2=2).square().sum(0) / (M - 1)
        values[2] /= 2
        dofs = errors.diagonal().square() / squares.clamp_min(1e-300)
        scale = values.abs().clamp_min(1e-300)
        return (errors / (scale[:, None] * scale)).cpu(), max(1, int(dofs.min()))

    @property
    def square_bias(self) -> float:
        """E‖Σ̂‖_F² - ‖Σ‖_F² of the sampled Σ̂ = n⁻² Σ_i S_i; 0 for fewer than 4 draws.

        E‖S_i - C_i‖_F² = κ_i/M_i + ((tr C_i)² + tr C_i²)/(M_i-1), κ_i the sum of the fourth cumulants κ_jkjk.
        """
        return _square_bias(self.sampled.moments, self.sampled.counts) / self.sampled.n**4


@dataclass(frozen=True)
class DataSource(NoiseSource):
    """Rows of collected data: independent draws of a gradient, or runs of a trajectory.

    Attributes:
        data: the rows.
    """

    data: NoiseData

    def along(self, V: Tensor) -> list[Estimate]:
        """The projected variance of the rows."""
        return self.data.variance_along(V)

    def leading(self, k: int, tol: float, seed: int, progress: bool) -> Eigenpairs:
        """The principal components."""
        return self.data.eigsh(k, tol, seed, progress=progress)

    @property
    def trace(self) -> Estimate | None:
        """Tr Σ with its error."""
        return self.data.trace

    def log_covariance(self, V: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """See :meth:`NoiseSource.log_covariance`; the jackknife leaves out a run, or one of 50 groups of rows."""
        X, data = self.data.rows, self.data
        groups = data.runs if data.kind == "trajectory" else min(GROUPS, len(X))
        P, norms = (X @ V).double(), X.double().square().sum(1)
        parts, sizes = P.tensor_split(groups), norms.tensor_split(groups)
        scatters = torch.stack([part.T @ part for part in parts])
        traces = torch.stack([part.sum() for part in sizes])
        return jackknife(scatters.sum(0), scatters, traces.sum(), traces, weights)

    @property
    def square_bias(self) -> float:
        """E‖Σ̂‖_F² - ‖Σ‖_F² of independent rows; 0 for a trajectory, whose covariance is that of its window."""
        count = torch.tensor(len(self.data.rows))
        return _square_bias(self.data.moments, count) if self.data.kind == "gradient" else 0.0


def jackknife(whole: Tensor, scatters: Tensor, trace: Tensor, traces: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Covariance of ln Σ_k w_k A_kk, ln trace and ln ‖A‖² under leaving out one of G parts of A and of the trace.

    Args:
        whole: A, (k, k).
        scatters: the parts, (G, k, k).
        trace: the whole trace.
        traces: its parts, (G,).
        weights: w, (k,).

    Returns:
        The (3, 3) matrix and G - 1; NaN and 0 for fewer than 3 parts.
    """
    G = len(traces)
    if G < 3:
        return torch.full((3, 3), math.nan, dtype=torch.float64), 0
    left, left_traces = whole - scatters, trace - traces
    products = (left.diagonal(dim1=1, dim2=2) * weights.to(left)).sum(1)
    logs = torch.stack([products.abs(), left_traces, left.square().sum((1, 2))], 1).clamp_min(1e-300).log()
    logs = logs - logs.mean(0)
    return logs.T @ logs * (G - 1) / G, G - 1


def _square_bias(moments: statistics.TraceMoments, draws: Tensor) -> float:
    draws = draws.to(moments.cumulant.device)
    each = moments.cumulant / draws + (moments.squared_trace + moments.trace_of_square) / (draws - 1)
    return max(float(each.nansum()), 0.0)


def _squared_deviations(gram: Tensor) -> Tensor:
    """‖g_m - ḡ‖² of each sample's draws, (samples, M), from their Gram matrices."""
    gram = gram.double() - gram.double().mean(1, keepdim=True)
    gram = gram - gram.mean(2, keepdim=True)
    return gram.diagonal(dim1=1, dim2=2)


def noise_source(noise: Noise, caller: str) -> NoiseSource:
    """Return the one face of any noise.

    Args:
        noise: a ``GradientNoise`` (its dropout part), that ``.dropout``, a :class:`NoiseData`, or any operator, which
            is taken as exact.
        caller: function named in the error.

    Raises:
        TypeError: if noise is none of these.
    """
    from dropscope.operators.exact_gradient_noise import ExactGradientNoise
    from dropscope.operators.gradient_noise import GradientNoise

    if isinstance(noise, NoiseData):
        return DataSource(noise.covariance, noise)
    if isinstance(noise, ExactGradientNoise):
        return NoiseSource(noise.dropout)
    if isinstance(noise, GradientNoise):
        return SampledSource(noise.dropout, noise)
    if not isinstance(noise, SymmetricOperator):
        raise TypeError(
            f"{caller}: noise must be a GradientNoise or a SymmetricOperator or NoiseData, got {type(noise).__name__}"
        )
    owner = getattr(noise, "noise", None)
    if isinstance(owner, GradientNoise) and noise is owner.dropout:
        return SampledSource(noise, owner)
    return NoiseSource(noise)


def embed(V: Tensor, operator: SymmetricOperator, problem: Problem, caller: str) -> Tensor:
    """Directions of a block of parameters as directions of all of them, zero elsewhere.

    Raises:
        ValueError: if the operator is of other parameters than the problem's, or of another dtype.
    """
    if operator.dtype == problem.dtype and operator.dim == problem.dim:
        return V
    if operator.dtype != problem.dtype or not operator.blocks or not set(operator.blocks) <= set(problem.blocks):
        raise ValueError(
            f"{caller}: noise must match the problem or blocks of it, dim {problem.dim} and {problem.dtype}, "
            f"got dim {operator.dim} and {operator.dtype}"
        )
    full = V.new_zeros(problem.dim, V.shape[1])
    for name, where in operator.blocks.items():
        full[problem.blocks[name]] = V[where]
    return full


def check_pairs(top: Eigenpairs, dim: int, k: int, caller: str) -> None:
    """Raise ValueError unless ``top`` holds at least k pairs of length dim."""
    if top.vectors.ndim != 2 or top.vectors.shape[0] != dim or top.vectors.shape[1] < k:
        raise ValueError(
            f"{caller}: top must hold at least {k} eigenvectors of length {dim}, got shape {tuple(top.vectors.shape)}"
        )
