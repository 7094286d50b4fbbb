"""A and B, theory: with dropout on the last hidden layer the exact noise resembles the Hessian, the more the wider."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dropscope.operators.exact_noise import ExactNoise
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.noise_networks import mean_error, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DROP = 0.2


def run(scale: Scale) -> Findings:
    """Measure at the small scale, or over more widths and seeds."""
    if scale.full:
        return _run(scale, seeds=5, widths=(8, 32, 128, 256), n=40)
    return _run(scale, seeds=3, widths=(8, 32, 96), n=12)


def _run(scale: Scale, seeds: int, widths: tuple[int, ...], n: int) -> Findings:
    numbers: dict[str, Any] = {"widths": list(widths), "error": [], "cosine": [], "null": [], "sampled": []}
    for width in widths:
        rows = [_measure(width, n, scale.seed + seed) for seed in range(seeds)]
        for key in ("error", "cosine", "null", "sampled"):
            numbers[key].append([row[key] for row in rows])
    setting = f"two-layer ReLU networks 4-m-1, {n} samples, drop {DROP}, squared loss at its minimum over the read-out"
    return Findings(_claims(numbers), numbers, f"{setting}, masks per sample, {seeds} seeds")


def _measure(width: int, n: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, width, bias=False), nn.ReLU(), nn.Dropout(DROP), nn.Linear(width, 1, bias=False))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[1] ** 0.5)
        # Targets are the network's own outputs: every residual is zero, as at a minimum that interpolates.
        y = model.eval()(X)
    problem = Problem(model, _half_square, (X, y))
    exact = ExactNoise(problem)
    noise, hessian = exact.to_dense(), Hessian(problem).to_dense()
    theory = _structure(problem, X, exact.kappa)
    with GradientNoise(problem, draws=16, seed=seed) as sampled:
        off = float((sampled.dropout.to_dense() - noise).norm() / noise.norm())
    norms = float(hessian.norm() * noise.norm())
    return {
        "error": float((theory - noise).norm() / noise.norm()),
        "cosine": float((hessian * noise).sum()) / norms,
        "null": float(hessian.trace() * noise.trace()) / problem.dim / norms,
        "sampled": off,
    }


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1)


def _structure(problem: Problem, X: Tensor, kappa: float) -> Tensor:
    """The wide-net form at zero residuals: n⁻² Σ_i κ S_i [∇f_i∇f_iᵀ + κ Σ_r ∇u_ri∇u_riᵀ], S_i = Σ_r u_ri²."""
    total = torch.zeros(problem.dim, problem.dim, dtype=torch.float64)
    first, last = problem.params.values()
    for x in X:
        pre = first.detach() @ x
        h, slope, a = pre.clamp_min(0.0), (pre > 0).double(), last.detach()[0]
        u = a * h
        m, d = first.shape
        grads = torch.zeros(m, problem.dim, dtype=torch.float64)  # of u_r: a_r σ' x in row r of W, h_r in a
        index = torch.arange(m)
        grads[:, : m * d].view(m, m, d)[index, index] = (a * slope)[:, None] * x
        grads[index, m * d + index] = h
        whole = grads.sum(0)
        total += kappa * float(u.square().sum()) * (torch.outer(whole, whole) + kappa * grads.T @ grads)
    return total / len(X) ** 2


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdicts: the error falls with every width and ends below 0.15; the cosine ends above 0.9 and ten nulls."""
    errors = [mean_error(values)[0] for values in numbers["error"]]
    falls = all(a > b for a, b in itertools.pairwise(errors)) and errors[-1] < 0.15
    cosines, nulls = np.array(numbers["cosine"][-1]), np.array(numbers["null"][-1])
    alike = bool((cosines > 0.9).all() and (cosines > 10 * nulls).all())
    widths = numbers["widths"]
    each = ", ".join(f"{shown(values)} at m = {m}" for m, values in zip(widths, numbers["error"], strict=True))
    return (
        Claim(
            "for a wide network the covariance is the Hessian's two terms with weights (theory of A and B)",
            "explicit forms of H and Σ are similar",
            f"relative error {each}",
            "reproduced" if falls else "not reproduced",
            "the weights κS_i are ours: the papers' own were not available to us",
        ),
        Claim(
            "at a minimum the covariance resembles the Hessian",
            "H aligns with Σ",
            f"cosine {shown(cosines.tolist())} at m = {widths[-1]}, {shown(nulls.tolist(), 3)} by chance",
            "reproduced" if alike else "not reproduced",
            f"the covariance is exact; 16 sampled masks a sample are off by {shown(numbers['sampled'][-1])}",
        ),
    )  # fmt: skip


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Error of the wide-net form, and cosine with its null, against width."""
    from dropscope.plot_style import BLUE, VERMILION, Figure, log_axis, style

    with style():
        figure = Figure(figsize=(7.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, key, color, label in (
            (left, "error", VERMILION, "wide-net form against exact Σ"),
            (left, "sampled", BLUE, "16 sampled masks against exact Σ"),
            (right, "cosine", VERMILION, r"cosine of $H$ and exact $\Sigma$"),
            (right, "null", BLUE, "same spectra, random eigenvectors"),
        ):
            mean, error = zip(*(mean_error(values) for values in numbers[key]), strict=True)
            axes.errorbar(numbers["widths"], mean, yerr=error, color=color, marker="o", markersize=4, label=label)
        for axes in (left, right):
            log_axis(axes, "x")
            log_axis(axes, "y")
            axes.set_xlabel("width m")
            axes.legend(loc="best")
        left.set_ylabel("relative Frobenius error")
        return figure


ENTRY = Entry(
    name="A-exact",
    paper="A",
    place="§5.1, structure of Σ and H",
    title="The exact covariance against the Hessian and the wide-net form, by width",
    minutes=0.5,
    run=run,
    plot=plot,
)
