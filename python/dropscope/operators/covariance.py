"""The covariance of stored gradients as an operator: within samples, between them, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from dropscope.operators.gradient_noise import GradientNoise


class CovarianceOperator(SymmetricOperator):
    """Σ_im g_im s_imᵀ with s = within·(g_im - ḡ_i) + between·(ḡ_i - ḡ): two passes over the factors a product."""

    def __init__(self, noise: GradientNoise, within: float = 0.0, between: float = 0.0) -> None:
        problem = noise.problem
        self.noise, self.within, self.between = noise, within, between
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks

    def __repr__(self) -> str:
        return f"CovarianceOperator(dim={self.dim}, {self.noise!r})"

    def _matmat(self, V: Tensor) -> Tensor:
        table = self.noise.table
        Vt = V.T.to(work_dtype(self.dtype)).contiguous()
        out = torch.zeros_like(Vt)
        if self.within == 0.0 and self.between == 0.0:
            return out.T.to(self.dtype)
        mean = Vt @ self.noise.mean if self.between else None
        for chunk in table.chunks():
            P = chunk.project(Vt).view(chunk.samples, chunk.draws, -1)
            average = P.mean(1, keepdim=True)
            S = (P - average) * self.within
            if mean is not None:
                S += (average - mean) * self.between
            chunk.accumulate(S.view(chunk.rows, -1), out)
        return out.T.to(self.dtype)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums."""
    return torch.promote_types(dtype, torch.float32)
