"""The spectral room: a Lanczos step against its product, products against ARPACK, the kernels against their reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import trained_mlp
from dropscope.operators import SymmetricOperator
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import eigsh
from dropscope.spectral.krylov import Krylov

BASIS = 25


@cache
def hessian() -> Hessian:
    model, x, y, _ = trained_mlp(target=0.2)
    return Hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)))


class Diagonal(SymmetricOperator):
    """A diagonal operator that counts its products."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.count = values, 0
        self.dim, self.dtype, self.device, self.blocks = len(values), values.dtype, values.device, {}

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        return self.values[:, None] * V


@contest("25 Lanczos steps on the Hessian of 784-500-500-10, n=1000", within=1.15, rounds=9)
def lanczos_steps() -> Contest:
    H = hessian()
    krylov = Krylov(H, BASIS, seed=0, full=False)
    v = torch.randn(H.dim, generator=torch.Generator().manual_seed(0))
    v /= v.norm()

    def steps() -> Tensor:
        krylov.start()
        while krylov.size < BASIS:
            krylov.advance()
        return torch.linalg.eigvalsh(krylov.T)[-1:]

    def products() -> Tensor:
        for _ in range(BASIS):
            out = H @ v
        return out

    def check(answers: Mapping[str, Any]) -> None:
        assert bool(torch.isfinite(answers["ours"]).all())
        Q = krylov.basis[: krylov.size + 1].double()
        assert float((Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)).abs().max()) < 1e-4

    return Contest(steps, check, ceiling=("25 products", products))


def network_like(n: int = 20000) -> Tensor:
    """Twenty outliers that fall by a quarter each, and a heavy-tailed bulk of both signs."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(n - 20, generator=generator, dtype=torch.float64) ** 3 * 0.15
    return torch.cat((50 * 0.75 ** torch.arange(20.0, dtype=torch.float64), bulk))


SPECTRA = {
    "network": network_like(),
    "semicircle": 2 * torch.cos(math.pi * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000),
    "power": (1 + torch.arange(20000, dtype=torch.float64)) ** -0.5,
}


@contest(
    "products for the top-10 pairs of three spectra at equal residuals, basis of 25; times are of a trivial product",
    rounds=3,
)
def products_against_arpack() -> Contest:
    counts: dict[str, list[int]] = {"ours": [], "ARPACK": []}
    tolerances: dict[str, float] = {}

    def arpack() -> list[Any]:
        counts["ARPACK"].clear()
        found = []
        for name, values in SPECTRA.items():
            A, d = Diagonal(values), values.numpy()
            v0 = np.random.default_rng(0).normal(size=len(d))
            theta, V = scipy_eigsh(A.to_scipy(), 10, which="LM", ncv=BASIS, tol=1e-4, v0=v0)
            worst = np.linalg.norm(d[:, None] * V - V * theta, axis=0).max() / np.abs(d).max()
            tolerances[name] = max(float(worst), 1e-12)
            counts["ARPACK"].append(A.count)
            found.append(np.sort(theta))
        return found

    def ours() -> list[Any]:
        counts["ours"].clear()
        found = []
        for name, values in SPECTRA.items():
            A = Diagonal(values)
            pairs = eigsh(A, 10, tol=tolerances[name], basis=BASIS, max_matvecs=10000)
            counts["ours"].append(A.count)
            found.append(np.sort(pairs.values.numpy()))
        return found

    def check(answers: Mapping[str, Any]) -> str:
        for mine, theirs in zip(answers["ours"], answers["ARPACK"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-3 * np.abs(theirs).max())
        return "products, ours/ARPACK: " + ", ".join(
            f"{name} {a}/{b}" for name, a, b in zip(SPECTRA, counts["ours"], counts["ARPACK"], strict=True)
        )

    arpack()
    return Contest(ours, check, competitors={"ARPACK": arpack})
