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
        than each; the covariance is the jackknife over the draws of every sample, whose variances add, linear in what
        a draw left out changes. Satterthwaite's degrees of freedom of the three, the fewest.

        Args:
            V: unit columns (dim, k).
            weights: w, (k,).

        Returns:
            The (3, 3) matrix, zero for an exact operator and NaN for fewer than 3 draws, and its degrees of freedom.
        """
        if self.sampled is None or self.sampled.table.quiet:
            return torch.zeros(3, 3, dtype=torch.float64), 10**9
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
        f64 = torch.float64
        values, errors, squares = torch.zeros(3, dtype=f64), torch.zeros(3, 3, dtype=f64), torch.zeros(3, dtype=f64)
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
        return errors / (scale[:, None] * scale), max(1, int(dofs.min()))

    @property
    def square_bias(self) -> float:
        """E‖Σ̂‖_F² - ‖Σ‖_F² of the sampled Σ̂ = n⁻² Σ_i S_i; 0 for an exact operator or fewer than 4 draws.

        E‖S_i - C_i‖_F² = κ_i/M_i + ((tr C_i)² + tr C_i²)/(M_i-1), κ_i the sum of the fourth cumulants κ_jkjk.
        """
        if self.sampled is None:
            return 0.0
        noise = self.sampled
        moments, M, n = noise.moments, noise.counts, noise.n
        each = moments.cumulant / M + (moments.squared_trace + moments.trace_of_square) / (M - 1)
        return max(float(each.nansum()) / n**4, 0.0)


def _squared_deviations(gram: Tensor) -> Tensor:
    """‖g_m - ḡ‖² of each sample's draws, (samples, M), from their Gram matrices."""
    gram = gram.double() - gram.double().mean(1, keepdim=True)
    gram = gram - gram.mean(2, keepdim=True)
    return gram.diagonal(dim1=1, dim2=2)


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
