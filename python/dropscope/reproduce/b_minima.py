"""B: minima found with dropout are flatter than those found without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dropscope.analyses import interval_flatness
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.noise_networks import block_problem, classifier, full_batch, mean_error, shown
from dropscope.spectral import eigsh

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RISE = 0.1  # of the loss at the ends of the interval
DROPS = (0.0, 0.2)


def run(scale: Scale) -> Findings:
    """Measure at the small scale, or the paper's."""
    if scale.full:
        return _run(scale, seeds=3, n=1500, steps=3000, directions=20)
    return _run(scale, seeds=3, n=500, steps=500, directions=4)


def _run(scale: Scale, seeds: int, n: int, steps: int, directions: int) -> Findings:
    numbers: dict[str, Any] = {key: [[] for _ in DROPS] for key in ("flatness", "sharpness", "risk")}
    numbers["drops"] = list(DROPS)
    name, data = "", None
    for seed in range(seeds):
        for j, drop in enumerate(DROPS):
            model, data, name = classifier(scale, seed, n, 0.2)
            for _ in full_batch(model, data, steps, 3e-3, scale.seed + seed, masks=drop > 0.0):
                pass
            problem = block_problem(model, data, None)
            risk = problem.risk()
            walk = interval_flatness(problem, _directions(problem, directions, seed), level=risk + RISE)
            # Along a filter-normalised direction the natural unit is that direction's own length, |θ| about.
            length = float(problem.flatten([p.detach() for p in problem.params.values()]).norm())
            numbers["flatness"][j].append(float(walk.flatness.mean()) / length)
            numbers["sharpness"][j].append(float(eigsh(Hessian(problem), 1, which="LA", tol=1e-2).values[0]))
            numbers["risk"][j].append(risk)
    setting = f"{data[0].shape[1]}-50-50-10, {name}, {steps} steps of full-batch Adam"  # type: ignore[index]
    return Findings(_claims(numbers), numbers, f"{setting}, {directions} directions, {seeds} seeds")


def _directions(problem: Problem, count: int, seed: int) -> Tensor:
    """Normal directions scaled row by row to the length of the rows of the weights, zero for biases."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for _ in range(count):
        parts = {}
        for name, p in problem.params.items():
            z = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            scale = p.detach().norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True)
            parts[name] = z * scale if p.ndim > 1 else torch.zeros_like(p)
        columns.append(problem.flatten(parts))
    return torch.stack(columns, 1).detach()


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdict: flatter if the difference over seeds is above two standard errors."""
    without, dropped = (np.array(values) for values in numbers["flatness"])
    gain, error = mean_error((dropped / without - 1.0).tolist())
    flatter = gain > 2 * error
    risks = [mean_error(values)[0] for values in numbers["risk"]]
    sharp = [shown(values) for values in numbers["sharpness"]]
    return (
        Claim(
            "minima found with dropout are flatter along filter-normalised directions (B; C, Table I)",
            "flatter in all settings",
            f"interval in units of |θ|: {shown(dropped.tolist(), 3)} with, {shown(without.tolist(), 3)} without "
            f"({100 * gain:+.0f} ± {100 * error:.0f} %)",
            "reproduced" if flatter else "not reproduced",
            f"λ_max(H) {sharp[1]} with, {sharp[0]} without, at training losses of {risks[1]:.1g} and {risks[0]:.1g}",
        ),
    )  # fmt: skip


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Interval flatness with and without dropout, a line for each seed."""
    from dropscope.plot_style import BLUE, style
    from dropscope.plot_style import single as one_panel

    with style():
        figure, axes = one_panel(4.2, 3.4)
        for pair in zip(*numbers["flatness"], strict=True):
            axes.plot([0, 1], pair, "o-", color=BLUE, alpha=0.8)
        axes.set_xticks([0, 1], [f"drop {drop:g}" for drop in numbers["drops"]])
        axes.set_xlim(-0.4, 1.4)
        axes.set_ylabel(rf"interval to a loss {RISE:g} higher, over $|\theta|$")
        return figure


ENTRY = Entry(
    name="B-minima",
    paper="B",
    place="flatness of the solutions",
    title="Flatness of minima found with and without dropout",
    minutes=0.5,
    run=run,
    plot=plot,
)
