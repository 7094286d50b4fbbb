"""A: Tr(HΣ) against isotropic noise and the cosine of H and Σ against random eigenvectors, along training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dropscope.analyses import follow
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.noise_networks import BLOCK, block_problem, classifier, full_batch, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEYS = ("step", "risk", "trace_product", "trace_product_stderr", "isotropic_product", "ratio", "ratio_stderr", "cosine",
        "cosine_stderr", "null", "null_spread", "exponent_curvature", "r_curvature")  # fmt: skip


def run(scale: Scale) -> Findings:
    """Measure at the small scale, or the paper's 30 checkpoints."""
    if scale.full:
        return _run(scale, seeds=3, n=1500, at=range(10, 301, 10), k=20, draws=8)
    return _run(scale, seeds=3, n=500, at=(5, 20, 40, 80, 120, 160), k=10, draws=6)


def _run(scale: Scale, seeds: int, n: int, at: Any, k: int, draws: int) -> Findings:
    numbers: dict[str, Any] = {"seeds": []}
    name, data = "", None
    for seed in range(seeds):
        model, data, name = classifier(scale, seed, n)
        loop = full_batch(model, data, max(at), 3e-3, scale.seed + seed)
        trace = follow(
            block_problem(model, data),
            loop,
            list(at),
            k=k,
            draws=draws,
            probes=8,
            tol=1e-2,
            flatness=False,
            seed=scale.seed + seed,
            progress=scale.progress,
        )
        numbers["seeds"].append({key: [row[key] for row in trace.table()] for key in KEYS})
    setting = f"{data[0].shape[1]}-50-50-10, {name}, block {BLOCK}, {draws} masks a sample"  # type: ignore[index]
    return Findings(_claims(numbers), numbers, f"{setting}, {len(at)} checkpoints, {seeds} seeds")


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Verdicts: the ratio less two standard errors above 3, the cosine five null deviations above, at every point."""
    tables = numbers["seeds"]

    def every(key: str) -> Any:
        return np.array([table[key] for table in tables], float)

    low = every("ratio") - 2 * every("ratio_stderr")
    ratios, share = every("ratio"), float((low > 3).mean())
    above = (every("cosine") - every("null")) / every("null_spread")
    growth = every("cosine")[:, -1] > every("cosine")[:, 0]
    slopes, rs = every("exponent_curvature")[:, -1], every("r_curvature")[:, -1]
    positive = bool((slopes > 0).all() and (rs > 0.7).all())
    return (
        Claim(
            "Tr(HΣ) is far above that of isotropic noise of equal trace throughout training (A §5.2)",
            "Tr(HΣ) ≫ Tr(HΣ̄) at 30 checkpoints; here: ratio > 3",
            f"ratio {ratios.min():.3g} to {ratios.max():.3g}; above 3 by two standard errors at {share:.0%}",
            "reproduced" if share == 1.0 else "partly" if float((ratios > 1).mean()) == 1.0 else "not reproduced",
            "" if share == 1.0 else f"the smallest lower bound is {low.min():.2f}",
        ),
        Claim(
            "the cosine of H and Σ is far above that of random matrices, the same-spectrum null too (A)",
            "random matrices ≤ .001",
            f"cosine {every('cosine').min():.2f} to {every('cosine').max():.2f}, null {every('null').min():.3f} to "
            f"{every('null').max():.3f}; {above.min():.0f} null deviations above at least",
            "reproduced" if float(above.min()) > 5 else "not reproduced",
        ),
        Claim(
            "the cosine grows after the initial phase (A)",
            "grows",
            f"from {shown(every('cosine')[:, 0])} to {shown(every('cosine')[:, -1])}",
            "reproduced" if bool(growth.all()) else "partly" if bool(growth.any()) else "not reproduced",
            "" if bool(growth.all()) else "the first checkpoint already is as high as the last in some seeds",
        ),
        Claim(
            "the noise is larger along sharper eigenvectors of H (A, B: Hessian-variance relation)",
            "positive slope",
            f"Var ~ λ^s, s = {shown(slopes.tolist())}, r = {shown(rs.tolist())} at the end",
            "reproduced" if positive else "partly" if bool((slopes > 0).all()) else "not reproduced",
            "" if positive else f"the weakest r over the seeds is {rs.min():.2f}",
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Traces and cosines over steps: the mean over seeds, bars of one standard deviation."""
    from dropscope.plot_style import BLUE, VERMILION, Figure, log_axis, style

    tables = numbers["seeds"]

    def spread(key: str) -> tuple[Any, Any]:
        values = np.array([table[key] for table in tables], float)
        return values.mean(0), values.std(0)

    with style():
        figure = Figure(figsize=(7.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = np.array(tables[0]["step"], float)
        for axes, key, color, label in (
            (left, "trace_product", VERMILION, r"$\mathrm{Tr}(H\Sigma)$"),
            (left, "isotropic_product", BLUE, r"$\mathrm{Tr}(H\bar\Sigma)$, isotropic"),
            (right, "cosine", VERMILION, r"cosine of $H$ and $\Sigma$"),
            (right, "null", BLUE, "same spectra, random eigenvectors"),
        ):
            mean, error = spread(key)
            axes.errorbar(x, mean, yerr=error, color=color, marker="o", markersize=3.6, label=label)
        for axes in (left, right):
            log_axis(axes, "y")
            axes.set_xlabel("step of full-batch Adam")
            axes.legend(loc="best")
        return figure


ENTRY = Entry(
    name="A-alignment",
    paper="A",
    place="§5.2, alignment along training",
    title="Tr(HΣ) and the cosine of H and Σ against two nulls, followed along training",
    minutes=0.5,
    run=run,
    plot=plot,
)
