"""Matrices as operators, and the laws that eigenpairs of any of them obey."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dropscope.operators import SymmetricOperator
from dropscope.spectral import Eigenpairs, EigenStatus


class Matrix(SymmetricOperator):
    """A dense matrix, or the diagonal one of a vector; ``hook`` sees the number of each product."""

    def __init__(self, M: Tensor, hook: Callable[[int], None] | None = None) -> None:
        self.M, self.hook, self.count = M, hook, 0
        self.dim, self.dtype, self.device, self.blocks = len(M), M.dtype, M.device, {}

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        if self.hook is not None:
            self.hook(self.count)
        return self.M @ V if self.M.ndim == 2 else self.M[:, None] * V


def true_residuals(A: Matrix, pairs: Eigenpairs) -> Tensor:
    wide = Matrix(A.M.double())
    V = pairs.vectors.double()
    return torch.linalg.vector_norm(wide @ V - V * pairs.values, dim=0)


def check(A: Matrix, pairs: Eigenpairs) -> None:
    """The laws that hold for any result."""
    k, eps = len(pairs.values), torch.finfo(A.dtype).eps
    residuals = true_residuals(A, pairs)
    slack = 0.1 * pairs.residuals + 20 * eps * pairs.scale
    assert (residuals <= pairs.residuals + slack).all(), (residuals, pairs.residuals)
    assert (residuals[pairs.converged] <= pairs.tol * pairs.scale + slack[pairs.converged]).all()
    V = pairs.vectors.double()
    assert float((V.T @ V - torch.eye(k, dtype=torch.float64)).abs().max()) < (1e-4 if eps > 1e-10 else 1e-12)
    assert pairs.matvecs == A.count
    assert (pairs.status is EigenStatus.CONVERGED) == bool(pairs.converged.all())


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    rising = values.double().sort().values
    if which == "LM":
        return rising[rising.abs().argsort(descending=True)][:k]
    if which == "SA":
        return rising[:k]
    falling = rising.flip(0)
    return falling[:k] if which == "LA" else torch.cat((falling[: k - k // 2], falling[len(falling) - k // 2 :]))


def spaced(n: int) -> Tensor:
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    values[-3:] = torch.tensor([10.0, 20.0, 40.0])
    return values
