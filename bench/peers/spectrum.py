"""Spectral density judged by its moments, and the trace at equal error, on the digits MLP: its dense Hessian is known.

Time is of the tool's own routine on its own Hessian of the network. The error of a trace is the root mean square over
seeds, each tool's routine on the dense matrix; each tool is told the fewest products that reach the error, and its
answer on the network is held against the exact trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, contest
from bench.peers import _tools as tools
from bench.workloads import network

NET = "digits MLP"
PROBES, STEPS = 6, 40
ERROR, SEEDS = 0.02, 12
LADDER = (12, 18, 24, 30, 36, 42, 48, 54, 60, 72, 84, 96, 120, 150, 192, 240, 300, 390, 480, 600)


@cache
def dense() -> Tensor:
    """The Hessian in float64 by double backward, its columns in blocks."""
    net = network(NET)
    product = tools.exact_product(net)
    return torch.cat([product(block) for block in torch.eye(net.dim, dtype=torch.float64).split(64)])


@cache
def moments() -> tuple[float, float]:
    """Mean of λ and of λ² over all eigenvalues."""
    H = dense()
    return float(H.trace()) / len(H), float(H.square().sum()) / len(H)


def density() -> Contest:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    from hessian_eigenthings import spectral_density

    import dropscope as ds

    net = network(NET)
    H, peer, linop = ds.Hessian(tools.problem(net)), tools.eigenthings(net), tools.curvlinops(net)

    def eigenthings() -> list[Tensor]:
        found = spectral_density(peer, num_runs=PROBES, lanczos_steps=STEPS, seed=0)
        return [(found.raw_weights.double() * found.raw_eigenvalues.double() ** k).sum(1) for k in (1, 2)]

    def curvlinops() -> list[Tensor]:
        torch.manual_seed(0)
        grid, rho = (t.double() for t in lanczos_approximate_spectrum(linop, STEPS, num_repeats=PROBES))
        mass = torch.trapezoid(rho, grid)
        return [mass[None], *(torch.trapezoid(rho * grid**k, grid)[None] / mass for k in (1, 2))]

    def ours() -> list[Tensor]:
        found = ds.spectral_density(H, probes=PROBES, steps=STEPS)
        return [(found.weights * found.nodes**k).sum(1) for k in (1, 2)]

    def check(answers: Mapping[str, Any]) -> str:
        """Moments of a quadrature are within five of their standard errors; a smoothed density is what it is."""
        truth, notes = moments(), []
        for name in ("ours", "hessian-eigenthings"):
            off = [
                abs(float(m.mean()) - t) / (float(m.std()) / PROBES**0.5)
                for m, t in zip(answers[name], truth, strict=True)
            ]
            assert max(off) < 5, f"{name}: moments {off} standard errors off"
            notes.append(f"{name}: moments {off[0]:.1f} and {off[1]:.1f} standard errors off")
        mass, *smoothed = (float(m) for m in answers["curvlinops"])
        off = [abs(m / t - 1) for m, t in zip(smoothed, truth, strict=True)]
        assert max(off) < 10, f"curvlinops: moments off by {off}"
        notes.append(f"curvlinops, smoothed: mass {mass:.2f}, moments off by {off[0]:.0%} and {off[1]:.0%}")
        broken = tools.refuses(
            lambda: tools.pyhessian(net).density(iter=5, n_v=1), (AttributeError, RuntimeError), "torch.linalg.eig"
        )
        return "; ".join([*notes, f"PyHessian 0.1: {broken}"])

    return Contest(ours, check, {"hessian-eigenthings": eigenthings, "curvlinops": curvlinops}, _products(net))


def _products(net: Any) -> tuple[str, Callable[[], Any]]:
    """Our own products alone: what a density cannot avoid."""
    import dropscope as ds

    H, v = ds.Hessian(tools.problem(net)), torch.ones(net.dim)

    def call() -> None:
        for _ in range(PROBES * STEPS):
            _ = H @ v

    return "the products", call


Estimator = Callable[[Any, int, int], float]  # operator, products, seed -> trace


def ours_trace(A: Any, products: int, seed: int) -> float:
    import dropscope as ds

    return ds.trace(A, matvecs=products, seed=seed).value


def eigenthings_trace(A: Any, products: int, seed: int) -> float:
    from hessian_eigenthings import trace

    return float(trace(A, num_matvecs=products, seed=seed).estimate)


def curvlinops_xtrace(A: Any, products: int, seed: int) -> float:
    from curvlinops import xtrace

    torch.manual_seed(seed)
    return float(xtrace(A, products))


def curvlinops_hutchpp(A: Any, products: int, seed: int) -> float:
    from curvlinops import hutchpp_trace

    torch.manual_seed(seed)
    return float(hutchpp_trace(A, products))


def hutchinson_products() -> int:
    """Products after which Hutchinson's rms error is ERROR: its variance with signs is 2‖H − diag H‖² a product."""
    H = dense()
    variance = 2 * float((H - H.diagonal().diag()).square().sum())
    return round(variance / (ERROR * float(H.trace())) ** 2)


def pyhessian_trace(net: Any, products: int) -> float:
    torch.manual_seed(0)
    values = tools.pyhessian(net).trace(maxIter=products, tol=0.0)
    return float(sum(values) / len(values))


def fewest(estimate: Estimator, A: Any) -> int:
    """The fewest products of a ladder that bring the rms error over seeds down to ERROR."""
    truth = float(dense().trace())
    for products in LADDER:
        errors = [estimate(A, products, seed) / truth - 1 for seed in range(SEEDS)]
        if sum(e**2 for e in errors) / SEEDS <= ERROR**2:
            return products
    raise RuntimeError(f"no number of products up to {LADDER[-1]} brings the error down to {ERROR}")


@contest(f"spectral density of the Hessian, digits MLP, {PROBES} probes of {STEPS} steps", rounds=2)
def density_digits() -> Contest:
    return density()


@contest(f"trace of the Hessian, digits MLP, rms error {ERROR:.0%}", rounds=3)
def trace_digits() -> Contest:
    from hessian_eigenthings import LambdaOperator

    import dropscope as ds

    net, H = network(NET), dense().float()
    mine, peer, linop = ds.Hessian(tools.problem(net)), tools.eigenthings(net), tools.curvlinops(net)
    exact_ours = ds.SymmetricOperator.from_callable(lambda v: H @ v, len(H))
    exact_peer = LambdaOperator(lambda v: H @ v, size=len(H))
    told = {
        "ours": fewest(ours_trace, exact_ours),
        "hessian-eigenthings, Hutch++": fewest(eigenthings_trace, exact_peer),
        "curvlinops, XTrace": fewest(curvlinops_xtrace, H),
        "curvlinops, Hutch++": fewest(curvlinops_hutchpp, H),
        "PyHessian, Hutchinson": hutchinson_products(),
    }

    def check(answers: Mapping[str, Any]) -> str:
        truth = float(dense().trace())
        errors = {name: abs(value / truth - 1) for name, value in answers.items()}
        assert max(errors.values()) < 5 * ERROR, f"errors of the trace {errors}"
        return "products " + ", ".join(f"{name} {products}" for name, products in told.items() if name in answers)

    return Contest(
        ours=lambda: ours_trace(mine, told["ours"], 0),
        competitors={
            "hessian-eigenthings, Hutch++": lambda: eigenthings_trace(peer, told["hessian-eigenthings, Hutch++"], 0),
            "curvlinops, XTrace": lambda: curvlinops_xtrace(linop, told["curvlinops, XTrace"], 0),
            "curvlinops, Hutch++": lambda: curvlinops_hutchpp(linop, told["curvlinops, Hutch++"], 0),
            "PyHessian, Hutchinson": lambda: pyhessian_trace(net, told["PyHessian, Hutchinson"]),
        },
        once=("PyHessian, Hutchinson",),
        check=check,
    )
