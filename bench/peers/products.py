"""One product with the Hessian, or the Gauss-Newton matrix, after whatever a tool prepares once.

The ceiling is one gradient of the same risk: what a product costs in gradients is what people compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.peers import _tools as tools
from bench.workloads import NETWORKS, Network, network

TOLERANCE = 1e-4


def vector(net: Network) -> Tensor:
    return torch.randn(net.dim, generator=torch.Generator().manual_seed(0))


def gradient(net: Network) -> Callable[[], Any]:
    parameters = list(net.model.parameters())
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(net.model(net.x), net.y), parameters)


def held(exact: Tensor, known: Mapping[str, float]) -> Callable[[Mapping[str, Any]], str]:
    """Every product is the exact one to TOLERANCE, but for tools whose known error may reach a bound, and is told."""

    def check(answers: Mapping[str, Any]) -> str:
        errors = {name: tools.relative(v, exact) for name, v in answers.items() if name != "a gradient"}
        for name, error in errors.items():
            assert error <= max(TOLERANCE, known.get(name, 0.0)), f"other answers, relative errors {errors}"
        wrong = [f"{name} is wrong by {error:.1e}" for name, error in errors.items() if error > TOLERANCE]
        right = max(error for error in errors.values() if error <= TOLERANCE)
        return "; ".join([f"relative errors below {right:.0e}", *wrong])

    return check


# jvp of a LayerNorm's backward under vmap gives the weights of the norms a wrong part, in float64 too; so torch 2.13.
KNOWN = {"curvlinops": 0.01}


def hessian(name: str) -> Contest:
    import dropscope as ds

    net = network(name)
    v, H = vector(net), ds.Hessian(tools.problem(net))
    eigenthings, linop, kept = tools.eigenthings(net), tools.curvlinops(net), tools.pyhessian(net)
    functional, pyhessian = tools.functional_product(net), tools.pyhessian_product(kept)
    return Contest(
        ours=lambda: H @ v,
        competitors={
            "hessian-eigenthings": lambda: eigenthings.matvec(v),
            "curvlinops": lambda: linop @ v,
            "PyHessian": lambda: pyhessian(v),
            "torch.func": lambda: functional(v),
        },
        ceiling=("a gradient", gradient(net)),
        check=held(tools.exact_product(net)(v), KNOWN if name == "GPT" else {}),
    )


def gauss_newton(name: str) -> Contest:
    import dropscope as ds

    net = network(name)
    v, G = vector(net), ds.GaussNewton(tools.problem(net))
    linop, eigenthings = tools.curvlinops(net, "GGNLinearOperator"), tools.eigenthings_ggn(net)
    return Contest(
        ours=lambda: G @ v,
        competitors={"curvlinops": lambda: linop @ v, "hessian-eigenthings": lambda: eigenthings.matvec(v)},
        ceiling=("a gradient", gradient(net)),
        check=held(tools.exact_ggn_product(net)(v), {}),
    )


def register(title: str, stem: str, make: Callable[[str], Contest]) -> None:
    for name in NETWORKS:

        def build(name: str = name) -> Contest:
            return make(name)

        build.__name__ = f"{stem}_{name.replace('-', '_').replace(' ', '_').lower()}"
        contest(f"{title}, {name}", rounds=5)(build)


register("Hessian product", "hessian", hessian)
register("Gauss-Newton product", "gauss_newton", gauss_newton)
