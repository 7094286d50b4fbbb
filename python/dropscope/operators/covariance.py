"""The covariance of stored gradients as an operator: within samples, between them, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from dropscope.factors import Table
    from dropscope.operators.gradient_noise import GradientNoise


class CovarianceOperator(SymmetricOperator):
    """Σ_im g_im s_imᵀ/M_i with s = M_i/(M_i-1)·(within + mean_error/M_i)(g_im - ḡ_i) + between·(ḡ_i - ḡ).

    Two passes over the factors; all columns of a product go through each tile together, in products of matrices.

    Args:
        noise: whose gradients; ḡ is the mean of the samples' means ḡ_i.
        within: weight of the covariance over its draws that each sample contributes.
        mean_error: the same for what the draws put into the covariance of the ḡ_i: weight·(covariance)/M_i.
        between: weight of the covariance of the ḡ_i.
    """

    def __init__(
        self, noise: GradientNoise, *, within: float = 0.0, mean_error: float = 0.0, between: float = 0.0
    ) -> None:
        problem = noise.problem
        self.noise, self.within, self.mean_error, self.between = noise, within, mean_error, between
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks

    def __repr__(self) -> str:
        return f"CovarianceOperator(dim={self.dim}, {self.noise!r})"

    def _matmat(self, V: Tensor) -> Tensor:
        table = self.noise.table
        Vt = V.T.to(work_dtype(self.dtype)).contiguous()
        out = torch.zeros_like(Vt)
        if table.quiet and self.between == 0.0:
            return out.T.to(self.dtype)
        mean = Vt @ self.noise.mean if self.between else None
        for chunk in table.chunks():
            M = chunk.draws
            S = chunk.project(Vt)
            average = None if mean is None else (S.view(chunk.samples, M, -1).mean(1) - mean) * (self.between / M)
            # One draw is stored where there is no mask, and has no variance.
            kernels.center(S, M, (self.within + self.mean_error / M) / (M - 1) if M > 1 else 0.0)
            if average is not None:
                S.view(chunk.samples, M, -1).add_(average.unsqueeze(1))
            chunk.accumulate(S, out)
        return out.T.to(self.dtype)


@dataclass(frozen=True)
class MiniBatchNoise:
    """Noise of a gradient averaged over ``size`` samples drawn with replacement, each with masks of its own.

    Attributes:
        size: b.
        dropout: W/b.
        sampling: B/b.
        total: (W + B)/b.
    """

    size: int
    dropout: SymmetricOperator
    sampling: SymmetricOperator
    total: SymmetricOperator

    def __repr__(self) -> str:
        return f"MiniBatchNoise(size={self.size}, dim={self.dropout.dim})"


def covariance_gram(table: Table, n: int) -> Tensor:
    """Gram matrix of the centred gradients (g_im - ḡ_i)/(n √(M_i-1)), rows sample-major; see GradientNoise.gram."""
    gram = table.gram()
    for _ in range(2):
        start = 0
        for chunk in table.chunks():
            part = gram[start : (start := start + chunk.rows)]
            kernels.center(part, chunk.draws, 1.0 / (n * (chunk.draws - 1) ** 0.5))
        gram = gram.T.contiguous()
    samples = torch.cat([chunk.ids.repeat_interleave(chunk.draws) for chunk in table.chunks()])
    order = samples.argsort(stable=True).to(gram.device)
    return gram if bool((samples[1:] >= samples[:-1]).all()) else gram[order][:, order]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums."""
    return torch.promote_types(dtype, torch.float32)
