"""One face for the two things an analysis takes as noise: sampled dropout noise with errors, or an exact operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope.estimate import Estimate
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from dropscope.operators.gradient_noise import GradientNoise


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

    def weighted(self, V: Tensor, weights: Tensor) -> Estimate | None:
        """Σ_k w_k v_kᵀΣv_k with the error that the masks give it; None for an exact operator.

        The sum is the trace of the noise in the metric V diag(w) Vᵀ, so that the errors of its terms, which share
        masks, are added as they correlate.
        """
        if self.sampled is None:
            return None
        noise = self.sampled
        rows = torch.cat([c.project(V.T.contiguous()).view(c.samples, -1, V.shape[1]) for c in noise.table.chunks()])
        P = rows.double()
        moments = statistics.trace_moments(torch.einsum("imk,k,ilk->iml", P, weights.to(P), P))
        variance = float(moments.variance.sum())
        error = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return Estimate(float(moments.trace.sum()) / len(P) ** 2, error / len(P) ** 2)

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
