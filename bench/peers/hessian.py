"""Top-10 Hessian eigenpairs of 784-500-500-10 at equal residuals: ours, hessian-eigenthings, curvlinops, PyHessian.

A pair counts as found when its true residual ‖Hv − λv‖, from a float64 product that belongs to none of the tools, is at
most TOL times the largest eigenvalue. Each tool gets its best case: the whole data set as one batch on every product.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import trained_mlp

K = 10
TOL = 1e-4

Pairs = tuple[Tensor, Tensor]  # values (k,) in falling order, vectors (dim, k)


def hessian_eigenthings(steps: int) -> Callable[[], Pairs]:
    """Its Lanczos with full reorthogonalisation, `steps` products; it has no stopping rule of its own."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    model, x, y, _ = trained_mlp()

    def call() -> Pairs:
        operator = HessianOperator(model, [(x, y)], supervised_loss(nn.functional.cross_entropy))
        found = lanczos(operator, k=K, max_iter=steps, reorthogonalize=True, seed=0)
        return found.eigenvalues.double(), found.eigenvectors.T

    return call


def hessian_eigenthings_doubling() -> Pairs:
    """What a user does who is not told the steps: its default of 2k, doubled until the residuals it reports pass."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    model, x, y, _ = trained_mlp()
    operator = HessianOperator(model, [(x, y)], supervised_loss(nn.functional.cross_entropy))
    steps = 2 * K
    while True:
        found = lanczos(operator, k=K, max_iter=steps, reorthogonalize=True, seed=0)
        if float(found.residuals.max()) <= TOL * float(found.eigenvalues.abs().max()):
            return found.eigenvalues.double(), found.eigenvectors.T
        steps *= 2


@cache
def fewest_steps() -> int:
    """The fewest Lanczos steps after which hessian-eigenthings' pairs all pass; found beforehand, at no cost to it."""
    for steps in range(2 * K, 10 * K):
        values, vectors = hessian_eigenthings(steps)()
        if float(residuals(values, vectors).max()) <= TOL:
            return steps
    raise RuntimeError("hessian-eigenthings never reached the residual")


def curvlinops_eigsh(tol: float) -> Pairs:
    """curvlinops' operator in scipy's eigsh. ARPACK's tolerance is relative to each value; its default is 0."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    model, x, y, _ = trained_mlp()
    parameters = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False
        ).to_scipy()
        values, vectors = eigsh(operator, k=K, which="LM", tol=tol)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def pyhessian_power() -> Pairs:
    """PyHessian's deflated power iteration; it stops on the change of the value, which must be far below a residual."""
    from pyhessian import hessian

    model, x, y, _ = trained_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of backward(create_graph=True)
        torch.manual_seed(0)
        operator = hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), data=(x, y), cuda=False)
        values, vectors = operator.eigenvalues(maxIter=1000, tol=2e-7, top_n=K)
    for parameter in operator.params:
        parameter.grad = None
    return torch.tensor(values, dtype=torch.float64), torch.stack(
        [torch.cat([t.reshape(-1) for t in v]) for v in vectors], 1
    )


def ours() -> Pairs:
    import dropscope as ds

    model, x, y, _ = trained_mlp()
    problem = ds.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=len(x))
    found = ds.eigsh(ds.Hessian(problem), k=K, which="LM", tol=TOL)
    if not bool(torch.as_tensor(found.converged).all()):
        raise AssertionError(f"ours did not converge: {found.status}")
    return torch.as_tensor(found.values).double(), found.vectors


@cache
def _product() -> Callable[[Tensor], Tensor]:
    model, x, y, _ = trained_mlp()
    model, x = copy.deepcopy(model).double(), x.double()
    parameters = list(model.parameters())
    risk = nn.functional.cross_entropy(model(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(risk, parameters, create_graph=True)])

    def product(v: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, parameters, grad_outputs=v, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def residuals(values: Tensor, vectors: Tensor) -> Tensor:
    """‖Hv − λv‖ / max |λ| for unit v, in float64 by plain double backward."""
    columns = [column / column.norm() for column in vectors.double().unbind(1)]
    gaps = [(_product()(v) - e * v).norm() for e, v in zip(values, columns, strict=True)]
    return torch.stack(gaps) / values.abs().max()


def check(answers: Mapping[str, Any]) -> str:
    """Every answer has K pairs within TOL, of the same values and the same space as ours."""
    mine, vectors = answers["ours"]
    worst = {}
    for name, (values, found) in answers.items():
        worst[name] = float(residuals(values, found).max())
        assert len(values) == K, f"{name} has {len(values)} pairs"
        # PyHessian stops on the change of the value: its residual cannot be asked for, and its time is a lower bound.
        asked = 10 * TOL if name == "PyHessian" else TOL
        assert worst[name] <= asked, f"{name}: residual {worst[name]:.1e}, asked {asked:g}"
        torch.testing.assert_close(values, mine, rtol=0, atol=asked * float(mine[0]), msg=f"{name}: other values")
        overlap = torch.linalg.svdvals(torch.linalg.qr(vectors.double())[0].T @ torch.linalg.qr(found.double())[0])
        assert float(overlap.min()) > 0.99, f"{name} and ours span other spaces: cosine {float(overlap.min()):.6f}"
    return "true residuals " + ", ".join(f"{name} {value:.0e}" for name, value in worst.items())


@contest(
    f"top-{K} Hessian pairs, 784-500-500-10, n=1000, residuals {TOL:g}",
    faster={
        "hessian-eigenthings, told the steps": 2.5,
        "curvlinops + scipy eigsh, told the tolerance": 6,
        "PyHessian": 10,
    },
    rounds=3,
    memory=True,
)
def top_pairs() -> Contest:
    import dropscope  # noqa: F401  (before the peers: a fair start for all)

    return Contest(
        ours=ours,
        competitors={
            "hessian-eigenthings, told the steps": lambda: hessian_eigenthings(fewest_steps())(),
            "hessian-eigenthings, doubling": hessian_eigenthings_doubling,
            "curvlinops + scipy eigsh, told the tolerance": lambda: curvlinops_eigsh(10 * TOL),
            "curvlinops + scipy eigsh, as documented": lambda: curvlinops_eigsh(0.0),
            "PyHessian": pyhessian_power,
        },
        once=("PyHessian", "hessian-eigenthings, doubling", "curvlinops + scipy eigsh, as documented"),
        check=check,
    )
