"""Top Hessian eigenpairs at equal residuals: ours, hessian-eigenthings, curvlinops with scipy's eigsh, PyHessian.

A pair counts as found when its true residual ‖Hv − λv‖, from a float64 product that belongs to none of the tools, is at
most TOL times the largest eigenvalue. Each tool gets its best case: the whole data set as one batch on every product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, contest
from bench.peers import _tools as tools
from bench.workloads import Network, network

TOL = 1e-4
TOLD, DOUBLING = "hessian-eigenthings, told the steps", "hessian-eigenthings, doubling"
TOLERANT, DEFAULT = "curvlinops + scipy eigsh, told the tolerance", "curvlinops + scipy eigsh, as documented"

Pairs = tuple[Tensor, Tensor]  # values (k,), vectors (dim, k)


def eigenthings(net: Network, k: int, steps: int) -> Any:
    """hessian-eigenthings' Lanczos with full reorthogonalisation, `steps` products; it has no stopping rule."""
    from hessian_eigenthings import lanczos

    return lanczos(tools.eigenthings(net), k=k, max_iter=steps, reorthogonalize=True, seed=0)


def pairs_of(found: Any) -> Pairs:
    return found.eigenvalues.double(), found.eigenvectors.T


def eigenthings_doubling(net: Network, k: int) -> Pairs:
    """What a user does who is not told the steps: its default of 2k, doubled until the residuals it reports pass."""
    steps = 2 * k
    while True:
        found = eigenthings(net, k, steps)
        if float(found.residuals.max()) <= TOL * float(found.eigenvalues.abs().max()):
            return pairs_of(found)
        steps *= 2


@cache
def fewest_steps(name: str, k: int) -> int:
    """The fewest Lanczos steps after which hessian-eigenthings' pairs all pass; found beforehand, at no cost to it."""
    net = network(name)
    low = high = 2 * k

    def passes(steps: int) -> bool:
        return float(residuals(net, *pairs_of(eigenthings(net, k, steps))).max()) <= TOL

    while not passes(high):
        low, high = high, high + k
        if high > 20 * k:
            raise RuntimeError("hessian-eigenthings never reached the residual")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def curvlinops_eigsh(net: Network, k: int, tol: float) -> Pairs:
    """curvlinops' operator in scipy's eigsh. ARPACK's tolerance is relative to each value; its default is 0."""
    from scipy.sparse.linalg import eigsh

    values, vectors = eigsh(tools.curvlinops(net).to_scipy(), k=k, which="LM", tol=tol)
    return torch.from_numpy(values).double(), torch.from_numpy(vectors)


def pyhessian_power(net: Network, k: int) -> Pairs:
    """PyHessian's deflated power iteration; it stops on the change of the value, which must be far below a residual."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        operator = tools.pyhessian(net)
        values, vectors = operator.eigenvalues(maxIter=1000, tol=2e-7, top_n=k)
    for parameter in operator.params:
        parameter.grad = None
    return torch.tensor(values, dtype=torch.float64), torch.stack([tools.flat(v) for v in vectors], 1)


def ours(net: Network, k: int) -> Pairs:
    import dropscope as ds

    problem = ds.Problem(net.model, torch.nn.CrossEntropyLoss(), (net.x, net.y), batch_size=len(net.x))
    found = ds.eigsh(ds.Hessian(problem), k=k, which="LM", tol=TOL)
    assert bool(torch.as_tensor(found.converged).all()), f"ours did not converge: {found.status}"
    return torch.as_tensor(found.values).double(), found.vectors


@cache
def product(name: str) -> tools.Product:
    return tools.exact_product(network(name))


def residuals(net: Network, values: Tensor, vectors: Tensor) -> Tensor:
    """‖Hv − λv‖ / max |λ| for unit v, in float64 by plain double backward."""
    columns = [column / column.norm() for column in vectors.double().unbind(1)]
    gaps = [(product(net.name)(v) - e * v).norm() for e, v in zip(values, columns, strict=True)]
    return torch.stack(gaps) / values.abs().max()


def checked(net: Network, k: int, loose: Mapping[str, float]) -> Callable[[Mapping[str, Any]], str]:
    # PyHessian stops on the change of the value: no residual can be asked for, and its time is a lower bound.
    allowed = {"PyHessian": 100 * TOL, **loose}

    def check(answers: Mapping[str, Any]) -> str:
        """Every answer has k orthogonal pairs within TOL, of the values that ours has."""
        mine = answers["ours"][0].sort().values
        worst = {}
        for name, (values, vectors) in answers.items():
            worst[name] = float(residuals(net, values, vectors).max())
            assert len(values) == k, f"{name} has {len(values)} pairs"
            asked = allowed.get(name, TOL)
            assert worst[name] <= asked, f"{name}: residual {worst[name]:.1e}, asked {asked:g}"
            gap = float((values.sort().values - mine).abs().max() / mine.abs().max())
            assert gap <= asked, f"{name}: values differ from ours by {gap:.1e} of the largest"
            columns = vectors.double() / vectors.double().norm(dim=0)
            skew = float((columns.T @ columns - torch.eye(k)).abs().max())
            assert skew <= 0.05, f"{name}: vectors are not orthogonal, cosine {skew:.1e}"
        return "true residuals " + ", ".join(f"{name} {value:.0e}" for name, value in worst.items())

    return check


def trial(name: str, k: int, loose: Mapping[str, float] | None = None) -> Contest:
    """The contest on a network; `loose` names tools whose answers are known to be worse, and by how much."""
    net = network(name)
    tools.problem(net)  # imports ours before the peers: a fair start for all
    return Contest(
        ours=lambda: ours(net, k),
        competitors={
            TOLD: lambda: pairs_of(eigenthings(net, k, fewest_steps(name, k))),
            DOUBLING: lambda: eigenthings_doubling(net, k),
            TOLERANT: lambda: curvlinops_eigsh(net, k, 10 * TOL),
            DEFAULT: lambda: curvlinops_eigsh(net, k, 0.0),
            "PyHessian": lambda: pyhessian_power(net, k),
        },
        once=("PyHessian", DOUBLING, DEFAULT),
        check=checked(net, k, loose or {}),
    )


FASTER = {TOLD: 2.5, TOLERANT: 6.0, "PyHessian": 10.0}


@contest(f"top-10 Hessian pairs, 784-500-500-10, n=1000, residuals {TOL:g}", faster=FASTER, rounds=3, memory=True)
def top_pairs() -> Contest:
    return trial("784-500-500-10", 10)


@contest(f"top-10 Hessian pairs, digits MLP (64-32-32-10), n=1000, residuals {TOL:g}", rounds=3)
def top_pairs_digits() -> Contest:
    return trial("digits MLP", 10)


@contest(f"top-3 Hessian pairs, ResNet (12074 parameters), n=100, residuals {TOL:g}", rounds=3)
def top_pairs_resnet() -> Contest:
    return trial("ResNet", 3)


@contest(f"top-3 Hessian pairs, GPT (118656 parameters), 16 rows of 32 bytes, residuals {TOL:g}", rounds=3)
def top_pairs_gpt() -> Contest:
    # curvlinops' product is wrong there (see products.py), so no tolerance brings its pairs below TOL.
    return trial("GPT", 3, {TOLERANT: 0.05, DEFAULT: 0.05})
