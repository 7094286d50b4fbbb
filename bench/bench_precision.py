"""Mixed precision against full: where low-precision products are cheap it gains, elsewhere it declines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import trained_mlp
from dropscope.operators import SymmetricOperator
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import Eigenpairs, eigsh

K = 10
TERMS = 8


class Layered(SymmetricOperator):
    """A dense matrix in float32, its full product the sum of the products with ``TERMS`` summands.

    A low-precision product goes through one matrix, the sum rounded to bfloat16, with a vector rounded to bfloat16: an
    eighth of the bytes read. This is the place of bfloat16 units on a machine that has none: the ratio of the times
    is real, measured, and printed; so is the error.
    """

    def __init__(self, parts: Tensor, low: bool = False) -> None:
        self.parts, self.count, self.low = parts, 0, low
        self.dim, self.dtype, self.device, self.blocks = parts.shape[1], torch.float32, parts.device, {}
        self.cheap: Layered | None = None

    def low_precision(self) -> Layered | None:
        if self.cheap is None and not self.low:
            self.cheap = Layered(self.parts.sum(0, keepdim=True).bfloat16().float(), low=True)
        return self.cheap

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        if self.low:
            V = V.bfloat16().float()
        out = self.parts[0] @ V
        for part in self.parts[1:]:
            out = out + part @ V
        return out.bfloat16().float() if self.low else out


def layered(n: int = 2000) -> Layered:
    """Outliers that fall by a tenth each, over a bulk of both signs."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((40 * 0.9 ** torch.arange(20.0), torch.linspace(-4, 4, n - 20)))
    U = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    M = (U * values) @ U.T
    M = (M + M.T) / 2
    parts = torch.randn(TERMS, n, n, generator=generator)
    parts = (parts + parts.mT) * (0.1 / n**0.5)
    parts[-1] = M - parts[:-1].sum(0)
    return Layered(parts)


@contest(f"top-{K} pairs at residual 1e-2 where low-precision products are >= 5 times faster", faster={"full": 1.5})
def cheap_products() -> Contest:
    A, found = layered(), {}
    v = torch.ones(A.dim) / A.dim**0.5
    times = {}
    for name, operator in (("full", A), ("low", A.low_precision())):
        assert operator is not None
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            operator @ v
            seconds.append(time.perf_counter() - start)
        times[name] = min(seconds)

    def run(precision: Any) -> Eigenpairs:
        found[precision] = eigsh(A, K, tol=1e-2, precision=precision)
        return found[precision]

    def check(answers: Mapping[str, Eigenpairs]) -> str:
        M = A.parts.double().sum(0)
        for name, pairs in answers.items():
            V = pairs.vectors.double()
            residuals = torch.linalg.vector_norm(M @ V - V * pairs.values, dim=0)
            assert bool(pairs.converged.all()), name
            assert float(residuals.max()) <= 1.01e-2 * pairs.scale, name
        mixed, full = found["mixed"], found["full"]
        return (
            f"a low-precision product is {times['full'] / times['low']:.1f}x faster; products: full {full.matvecs}, "
            f"mixed {mixed.matvecs} + {mixed.low_matvecs} low; auto: {found['auto'].precision}"
        )

    return Contest(lambda: run("mixed"), check, competitors={"full": lambda: run("full"), "auto": lambda: run("auto")})


@contest("auto against full on a Hessian of 784-500-500-10: declined where there are no bfloat16 units", rounds=3)
def hessian_auto() -> Contest:
    model, x, y, _ = trained_mlp()
    H = Hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)))
    low = H.lowered()
    v = torch.randn(H.dim, generator=torch.Generator().manual_seed(0))
    times = {}
    for name, operator in (("full", H), ("low", low)):
        operator @ v
        start = time.perf_counter()
        operator @ v
        times[name] = time.perf_counter() - start
    image = H @ v
    error = float((low @ v - image).norm() / image.norm())
    low.close()

    def check(answers: Mapping[str, Eigenpairs]) -> str:
        torch.testing.assert_close(answers["ours"].values, answers["full"].values, rtol=1e-2, atol=1e-2)
        return (
            f"a bfloat16 product takes {times['low'] / times['full']:.1f} of a float32 one's time and is off by "
            f"{error:.1e}; {answers['ours'].precision}"
        )

    return Contest(
        lambda: eigsh(H, K, tol=1e-2, precision="auto"), check, competitors={"full": lambda: eigsh(H, K, tol=1e-2)}
    )
