"""A and B: the variance of random trajectory data falls with flatness, if the window is short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dropscope.analyses import fit_power_law, trajectory_data, variance_flatness
from dropscope.operators.hessian import Hessian
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.noise_networks import BLOCK, block_problem, mean_error, shown, trained
from dropscope.spectral import eigsh

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Noise, and rate · steps · λ_max(H) of a run.
SERIES: tuple[tuple[str, float], ...] = (("dropout", 0.5), ("dropout", 50.0), ("weights", 0.5))


def run(scale: Scale) -> Findings:
    """Measure at the small scale, or the paper's."""
    if scale.full:
        return _run(scale, seeds=3, n=1500, steps=1500, count=1000, runs=8, k=30)
    return _run(scale, seeds=3, n=500, steps=300, count=150, runs=6, k=16)


def _run(scale: Scale, seeds: int, n: int, steps: int, count: int, runs: int, k: int) -> Findings:
    numbers: dict[str, Any] = {"series": [[noise, window] for noise, window in SERIES], "runs": [[] for _ in SERIES]}
    name = ""
    for seed in range(seeds):
        model, data, name = trained(scale, seed, n, steps)
        problem = block_problem(model, data, None)
        sharpness = float(eigsh(Hessian(problem), 1, which="LA", tol=1e-2).values[0])
        along: tuple[Tensor, list[float]] | None = None
        for where, (noise, window) in zip(numbers["runs"], SERIES, strict=True):
            rate = window / (count * sharpness)
            rows = trajectory_data(
                problem,
                count,
                rate,
                noise=noise,  # type: ignore[arg-type]
                names=BLOCK,
                runs=runs,
                scale=1e-5 if noise == "weights" else None,
                sharpness=sharpness,
                seed=scale.seed + seed,
                progress=scale.progress,
            )
            if noise == "dropout":
                top = rows.eigsh(k, tol=1e-3)
                got = variance_flatness(problem, rows, k, top=top)
                flat, law = got.flatness.flatness.tolist(), got.law
                variances = [v.value for v in got.variances]
                along = along or (top.vectors, flat)
            else:
                # Its own principal directions are random: what can be asked is whether it is larger in the directions
                # that dropout singled out over the short window.
                assert along is not None
                flat, variances = along[1], [v.value for v in rows.variance_along(along[0])]
                law = fit_power_law(flat, variances)
            entry = {"F": flat, "variance": variances, "slope": law.slope.value, "r": law.r}
            where.append(entry | {"status": rows.status, "drift": rows.drift})
    setting = f"{data[0].shape[1]}-50-50-10, {name}, block {BLOCK}, {runs} runs of {count} steps, {k} directions"
    return Findings(_claims(numbers), numbers, f"{setting}, {seeds} seeds")


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdicts: negative if mean + 2 standard errors < 0; the window matters if the long one's slope is higher.

    The control has no relation if its slope is within two standard errors of zero and above that of dropout by two
    standard errors of the difference; "partly" if the latter is not so, for then it is too wide to tell. In a first run
    it was judged along its own principal directions, over fewer runs: these are random, and told nothing.
    """
    slopes = [[run["slope"] for run in runs] for runs in numbers["runs"]]
    rs = [[run["r"] for run in runs] for runs in numbers["runs"]]
    (short, error), (long, long_error), (none, none_error) = (mean_error(values) for values in slopes)
    negative = short + 2 * error < 0
    lost = long - short > 2 * float(np.hypot(error, long_error))
    zero = abs(none) < 2 * none_error
    apart = none - short > 2 * float(np.hypot(error, none_error))
    return (
        Claim(
            "random trajectory data under dropout: the variance falls with the interval flatness (A, B §5.2)",
            "negative slope (Feng and Tu: about -4 for SGD)",
            f"slope {shown(slopes[0])}, r {shown(rs[0])} with rate·N·λ_max = {SERIES[0][1]:g}",
            "reproduced" if negative else "not reproduced",
            "" if negative else "the slope's interval over seeds holds zero",
        ),
        Claim(
            "the same for a long window (our own caution: the papers do not state the window)",
            "not stated",
            f"slope {shown(slopes[1])}, r {shown(rs[1])} with rate·N·λ_max = {SERIES[1][1]:g}",
            "not reproduced" if lost else "reproduced",
            "relaxation and drift of the flat directions dominate the covariance: the window rule matters"
            if lost
            else "here the relation survives the long window",
        ),
        Claim(
            "isotropic weight noise shows no relation (control)",
            "none",
            f"slope {shown(slopes[2])}, r {shown(rs[2])} along the principal directions of dropout's trajectories",
            "not reproduced" if not zero else "reproduced" if apart else "partly",
            "" if zero and apart else f"against {shown(slopes[0])} under dropout",
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Variance against flatness for each series, a colour for each seed."""
    from dropscope.plot_style import Figure, log_axis, shades, style

    with style():
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(numbers["series"]))
        for axes, (noise, window), runs in zip(panels, numbers["series"], numbers["runs"], strict=True):
            for run, color in zip(runs, shades(len(runs)), strict=True):
                axes.plot(run["F"], run["variance"], "o", color=color, markersize=3.6)
            label = "dropout" if noise == "dropout" else "isotropic"
            slope = shown([run["slope"] for run in runs])
            axes.set_title(f"{label}, window {window:g}: s = {slope}", fontsize=8)
            log_axis(axes, "x")
            log_axis(axes, "y")
            axes.set_xlabel(r"interval flatness $F_i$  [$\theta$]")
        panels[0].set_ylabel(r"variance of the trajectory  [$\theta^2$]")
        return figure


ENTRY = Entry(
    name="A-trajectory",
    paper="A",
    place="§5.2, random trajectory data",
    title="Variance of detrended trajectories against interval flatness: short and long windows, isotropic control",
    minutes=1.0,
    run=run,
    plot=plot,
)
