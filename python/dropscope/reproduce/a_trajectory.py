"""A and B: the variance of random trajectory data falls with flatness, if the window is short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dropscope.analyses import trajectory_data, variance_flatness
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
        return _run(scale, seeds=3, n=1500, steps=1500, count=1000, runs=4, k=30)
    return _run(scale, seeds=3, n=500, steps=300, count=150, runs=2, k=12)


def _run(scale: Scale, seeds: int, n: int, steps: int, count: int, runs: int, k: int) -> Findings:
    numbers: dict[str, Any] = {"series": [[noise, window] for noise, window in SERIES], "runs": [[] for _ in SERIES]}
    name = ""
    for seed in range(seeds):
        model, data, name = trained(scale, seed, n, steps)
        problem = block_problem(model, data, None)
        sharpness = float(eigsh(Hessian(problem), 1, which="LA", tol=1e-2).values[0])
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
            got = variance_flatness(problem, rows, k, top=rows.eigsh(k, tol=1e-3))
            where.append(
                {
                    "F": got.flatness.flatness.tolist(),
                    "variance": [v.value for v in got.variances],
                    "slope": got.law.slope.value,
                    "r": got.law.r,
                    "spread": _spread(got.flatness.flatness.numpy()),
                    "status": rows.status,
                    "drift": rows.drift,
                }
            )
    setting = f"{data[0].shape[1]}-50-50-10, {name}, block {BLOCK}, {runs} runs of {count} steps, {k} directions"
    return Findings(_claims(numbers), numbers, f"{setting}, {seeds} seeds")


def _spread(flatness: Any) -> float:
    """Range of ln F over the directions in which the loss reaches the level."""
    finite = flatness[np.isfinite(flatness)]
    return float(np.ptp(np.log(finite))) if len(finite) else 0.0


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdicts: negative if mean + 2 standard errors < 0; the window matters if the long one's slope is higher."""
    slopes = [[run["slope"] for run in runs] for runs in numbers["runs"]]
    rs = [[run["r"] for run in runs] for runs in numbers["runs"]]
    spreads = [mean_error([run["spread"] for run in runs])[0] for runs in numbers["runs"]]
    (short, error), (long, long_error) = mean_error(slopes[0]), mean_error(slopes[1])
    negative = short + 2 * error < 0
    lost = long - short > 2 * float(np.hypot(error, long_error))
    # Isotropic noise has no principal directions: these scatter over random directions, whose flatness hardly varies.
    none = spreads[2] < 0.5 * spreads[0] or abs(mean_error(slopes[2])[0]) < 2 * mean_error(slopes[2])[1]
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
            f"slope {shown(slopes[2])}, r {shown(rs[2])}; its directions differ in ln F by {spreads[2]:.2f}, "
            f"those of dropout by {spreads[0]:.2f}",
            "reproduced" if none else "not reproduced",
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
    minutes=2.0,
    run=run,
    plot=plot,
)
