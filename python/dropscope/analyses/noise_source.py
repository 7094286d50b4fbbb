"""One face for the two things an analysis takes as noise: sampled dropout noise with errors, or an exact operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope.estimate import Estimate
from dropscope.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from dropscope.operators.gradient_noise import GradientNoise
    from dropscope.spectral import Eigenpairs


@dataclass(frozen=True)
class NoiseSource:
    """A covariance Σ and, where it was estimated from sampled masks, the errors of what is read off it.

    Attributes:
        operator: products with Σ.
        sampled: the noise behind it; None for an operator that is taken as exact.
    """

    operator: SymmetricOperator
    sampled: GradientNoise | None = None

    def along(self, V: Tensor) -> list[Estimate]:
        """vᵀΣv for each unit column v of V, (dim, k)."""
        if self.sampled is not None:
            return self.sampled.variance_along(V)
        values: Tensor = (V.double() * (self.operator @ V).double()).sum(0)
        return [Estimate(value, 0.0, scale=True) for value in values.tolist()]

    @property
    def trace(self) -> Estimate | None:
        """Tr Σ with its error; None when only products are known."""
        return None if self.sampled is None else self.sampled.trace

    def log_covariance(self, V: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """Covariance of the errors that the masks give to three logarithms, and its degrees of freedom.

        The three are Σ_k w_k v_kᵀΣ̂v_k, Tr Σ̂ and ‖VᵀΣ̂V‖_F². They share masks, so that their ratios are known far better
        than each; the covariance is the jackknife over draws, M - 1 degrees of freedom.

        Args:
            V: unit columns (dim, k).
            weights: w, (k,).

        Returns:
            The (3, 3) matrix, zero for an exact operator and NaN for fewer than 3 draws, and its degrees of freedom.
        """
        if self.sampled is None or self.sampled.table.quiet:
            return torch.zeros(3, 3, dtype=torch.float64), 10**9
        chunks, M = list(self.sampled.table.chunks()), self.sampled.draws
        if M < 3:
            return torch.full((3, 3), math.nan, dtype=torch.float64), 0
        Vt = V.T.contiguous()
        P = torch.cat([chunk.project(Vt).view(chunk.samples, M, -1) for chunk in chunks]).double()
        gram = torch.cat([chunk.sample_gram() for chunk in chunks]).double()
        P = P - P.mean(1, keepdim=True)
        gram = gram - gram.mean(1, keepdim=True)
        gram = gram - gram.mean(2, keepdim=True)
        # Deviations sum to zero, so leaving draw m out takes (1 + 1/(M-1)) x_m x_mᵀ from the sum of squares.
        whole, each = torch.einsum("imk,iml->kl", P, P), torch.einsum("imk,iml->mkl", P, P)
        left = whole - each * M / (M - 1)
        norms = gram.diagonal(dim1=1, dim2=2).sum(0)
        traces = norms.sum() - norms * M / (M - 1)
        products = (left.diagonal(dim1=1, dim2=2) * weights.to(left)).sum(1)
        logs = torch.stack([products.abs(), traces, left.square().sum((1, 2))], 1).clamp_min(1e-300).log()
        logs = logs - logs.mean(0)
        return logs.T @ logs * (M - 1) / M, M - 1

    @property
    def square_bias(self) -> float:
        """E‖Σ̂‖_F² - ‖Σ‖_F² of the sampled Σ̂ = n⁻² Σ_i S_i; 0 for an exact operator or fewer than 4 draws.

        E‖S_i - C_i‖_F² = κ_i/M + ((tr C_i)² + tr C_i²)/(M-1), κ_i the sum of the fourth cumulants κ_jkjk.
        """
        if self.sampled is None:
            return 0.0
        noise = self.sampled
        moments, M, n = noise.moments, noise.draws, noise.n
        each = moments.cumulant / M + (moments.squared_trace + moments.trace_of_square) / (M - 1)
        total = float(each.sum()) / n**4
        return 0.0 if math.isnan(total) else max(total, 0.0)


def noise_source(noise: GradientNoise | SymmetricOperator, caller: str) -> NoiseSource:
    """Return the dropout part of a ``GradientNoise`` with its errors, or an operator taken as exact.

    Args:
        noise: a ``GradientNoise``, its ``.dropout``, or any operator.
        caller: function named in the error.

    Raises:
        TypeError: if noise is none of these.
    """
    from dropscope.operators.gradient_noise import GradientNoise

    if isinstance(noise, GradientNoise):
        return NoiseSource(noise.dropout, noise)
    if not isinstance(noise, SymmetricOperator):
        raise TypeError(f"{caller}: noise must be a GradientNoise or a SymmetricOperator, got {type(noise).__name__}")
    owner = getattr(noise, "noise", None)
    if isinstance(owner, GradientNoise) and noise is owner.dropout:
        return NoiseSource(noise, owner)
    return NoiseSource(noise)


def check_pairs(top: Eigenpairs, dim: int, k: int, caller: str) -> None:
    """Raise ValueError unless ``top`` holds at least k pairs of length dim."""
    if top.vectors.ndim != 2 or top.vectors.shape[0] != dim or top.vectors.shape[1] < k:
        raise ValueError(
            f"{caller}: top must hold at least {k} eigenvectors of length {dim}, got shape {tuple(top.vectors.shape)}"
        )
