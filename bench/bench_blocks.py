"""Products with eight vectors at once against one by one, on a small and a large network; Σ in bench_factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import digits, mlp, trained_mlp
from dropscope.operators.gauss_newton import GaussNewton
from dropscope.operators.graphs import GraphOperator
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import spectral_density, trace

K = 8


def _small() -> Problem:
    x, y = digits(200, size=8)
    return Problem(mlp((64, 32, 10)).eval(), nn.CrossEntropyLoss(), (x, y))


def _large() -> Problem:
    model, x, y, _ = trained_mlp()
    return Problem(model, nn.CrossEntropyLoss(), (x, y))


def _products(of: type[GraphOperator], problem: Problem) -> Contest:
    chosen, alone, together = of(problem), of(problem, block=1), of(problem, block=K)
    V = torch.randn(problem.dim, K, generator=torch.Generator().manual_seed(0))
    chosen @ V

    def check(answers: Mapping[str, Tensor]) -> str:
        for name, answer in answers.items():
            torch.testing.assert_close(answer, answers["one by one"], rtol=1e-3, atol=1e-5, msg=name)
        return chosen.plan().splitlines()[-1]

    return Contest(
        lambda: chosen @ V, check, competitors={"one by one": lambda: alone @ V, "together": lambda: together @ V}
    )


@contest("8 Hessian products, digits MLP 64-32-10, n=200, as the trial decides", faster={"one by one": 0.95})
def small_hessian() -> Contest:
    return _products(Hessian, _small())


@contest("8 Gauss-Newton products, digits MLP 64-32-10, n=200, as the trial decides", faster={"one by one": 0.95})
def small_gauss_newton() -> Contest:
    return _products(GaussNewton, _small())


@contest("8 Hessian products, 784-500-500-10, n=1000, as the trial decides", faster={"one by one": 0.95}, rounds=3)
def large_hessian() -> Contest:
    return _products(Hessian, _large())


def _estimates(estimate: Callable[[Hessian], Any]) -> Contest:
    """A new operator each time, so that the trial is part of the price."""
    problem = _small()

    def check(answers: Mapping[str, Any]) -> None:
        mine, theirs = answers["ours"].value, answers["one by one"].value
        assert abs(mine - theirs) <= 1e-3 * abs(theirs)

    return Contest(
        lambda: estimate(Hessian(problem)),
        check,
        competitors={"one by one": lambda: estimate(Hessian(problem, block=1))},
    )


@contest("density of 8 probes, digits MLP 64-32-10, the trial included", faster={"one by one": 0.95})
def small_density() -> Contest:
    return _estimates(lambda H: spectral_density(H, probes=8, steps=40).moment(1))


@contest("trace, digits MLP 64-32-10, the trial included", faster={"one by one": 0.95})
def small_trace() -> Contest:
    return _estimates(trace)
