"""A and B: the relations of noise, curvature and flatness on a small transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dropscope.analyses import noise_structure
from dropscope.losses import causal_lm
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.problem import Problem
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.noise_networks import language_model, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = "blocks.layers.0.linear1.weight"


def run(scale: Scale) -> Findings:
    """Measure at the small scale, or on longer sequences."""
    if scale.full:
        return _run(scale, seeds=3, sequences=512, length=64, width=48, steps=1500, draws=8, k=20)
    return _run(scale, seeds=3, sequences=48, length=24, width=16, steps=150, draws=6, k=12)


def _run(scale: Scale, seeds: int, sequences: int, length: int, width: int, steps: int, draws: int, k: int) -> Findings:
    numbers: dict[str, Any] = {"seeds": []}
    name = ""
    for seed in range(seeds):
        model, data, name = language_model(scale, seed, sequences, length, width, steps)
        problem = Problem(model, causal_lm(), data, params=BLOCK)
        with GradientNoise(problem, draws, scale.seed + seed) as noise:
            got = noise_structure(problem, noise, step=steps, k=k, probes=8, tol=1e-2, progress=scale.progress)
        assert got.flatness is not None
        a = got.alignment
        numbers["seeds"].append(
            {
                "risk": got.risk,
                "F": got.flatness.flatness.flatness.tolist(),
                "variance": [v.value for v in got.flatness.variances],
                "slope": got.flatness.law.slope.value,
                "r": got.flatness.law.r,
                "lambda": got.curvature.eigenvalues.tolist(),
                "along": [v.value for v in got.curvature.variances],
                "exponent": got.curvature.law.slope.value,
                "ratio": a.ratio.value,
                "ratio_stderr": a.ratio.stderr,
                "cosine": a.cosine.value,
                "null": a.null.value,
            }
        )
    setting = f"2-block causal transformer of width {width}, dropout 0.1, {sequences} sequences of {length} characters"
    return Findings(_claims(numbers), numbers, f"{setting}, {name}, block {BLOCK}, {seeds} seeds")


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdicts: slope < 0 and r < -0.9 (flatness); exponent > 0 (curvature); ratio - 2 errors > 3; at each seed."""

    def column(key: str) -> Any:
        return np.array([entry[key] for entry in numbers["seeds"]], float)

    slopes, rs, ratios = column("slope"), column("r"), column("ratio")
    negative, straight = bool((slopes < 0).all()), bool((rs < -0.9).all())
    low = ratios - 2 * column("ratio_stderr")
    return (
        Claim(
            "transformer: the noise variance falls with the interval flatness (A, B)",
            "negative slope, a straight line",
            f"slope {shown(slopes.tolist())}, r {shown(rs.tolist())}",
            "reproduced" if negative and straight else "partly" if negative else "not reproduced",
            "" if straight else f"the weakest r over the seeds is {rs.max():.2f}",
        ),
        Claim(
            "transformer: the noise is larger along sharper eigenvectors of H (A, B)",
            "positive slope",
            f"Var ~ λ^s, s = {shown(column('exponent').tolist())}",
            "reproduced" if bool((column("exponent") > 0).all()) else "not reproduced",
        ),
        Claim(
            "transformer: Tr(HΣ) is far above that of isotropic noise (A)",
            "Tr(HΣ) ≫ Tr(HΣ̄); here: ratio > 3",
            f"ratio {shown(ratios.tolist())}, cosine {shown(column('cosine').tolist())} "
            f"({shown(column('null').tolist(), 3)} by chance)",
            "reproduced" if bool((low > 3).all()) else "partly" if bool((low > 1).all()) else "not reproduced",
            "" if bool((low > 3).all()) else f"the smallest lower bound is {low.min():.2f}",
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Variance against flatness and against curvature, a colour for each seed."""
    from dropscope.plot_style import Figure, log_axis, shades, style

    with style():
        figure = Figure(figsize=(7.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for entry, color in zip(numbers["seeds"], shades(len(numbers["seeds"])), strict=True):
            left.plot(entry["F"], entry["variance"], "o", color=color, markersize=3.6)
            right.plot(entry["lambda"], entry["along"], "o", color=color, markersize=3.6)
        for axes in (left, right):
            log_axis(axes, "x")
            log_axis(axes, "y")
        left.set_xlabel(r"interval flatness $F_i$  [$\theta$]")
        right.set_xlabel(r"Hessian eigenvalue $\lambda_j$")
        left.set_ylabel("noise variance")
        return figure


ENTRY = Entry(
    name="A-transformer",
    paper="A",
    place="§5.2, transformer",
    title="Noise, curvature and flatness on a small transformer",
    minutes=0.5,
    run=run,
    plot=plot,
)
