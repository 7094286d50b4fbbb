"""Figures for papers: labelled axes with units, error bars on every estimate, colours that survive colour blindness.

Every function takes a result (many also take several, as a mapping from label to result) and returns a
:class:`matplotlib.figure.Figure` that belongs to nobody: no pyplot, no backend, nothing global is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from dropscope.plot_style import (
    BLUE,
    FAINT,
    VERMILION,
    Figure,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    Vector,
    exponent,
    hollow_note,
    law_line,
    legend,
    log_axis,
    scatter,
    series,
    shades,
    single,
    styled,
)

if TYPE_CHECKING:
    from dropscope.analyses import HessianVariance, IntervalFlatness, NoiseTrace, VarianceFlatness
    from dropscope.estimate import Estimate
    from dropscope.spectral import DiagonalEstimate, Eigenpairs, SpectralDensity


@styled
def hessian_variance(results: HessianVariance | Mapping[str, HessianVariance]) -> Figure:
    """Noise variance along Hessian eigenvectors against their eigenvalues, log–log, with the fitted power law.

    Bars are 95 % intervals; hollow points are heavy-tailed, their bars too short. The dashed line of one result is
    isotropic noise of the same trace.
    """
    figure, axes = single(5.4, 4.0)
    shown = series(results)
    for (label, result), color in zip(shown.items(), shades(len(shown)), strict=True):
        x = result.eigenvalues.numpy()
        positive = x > 0
        kept = [e for e, use in zip(result.variances, positive, strict=True) if use]
        law_line(axes, result.law, x, color)
        text = exponent(result.law, len(shown) == 1)
        scatter(axes, x[positive], kept, color, f"{label}:  {text}" if label else text)
    log_axis(axes, "x")
    log_axis(axes, "y")
    if len(shown) == 1:
        result = next(iter(shown.values()))
        level = result.alignment.trace_noise.value / result.dim
        axes.axhline(level, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label="isotropic noise of equal trace")
    hollow_note(axes, [e for result in shown.values() for e in result.variances])
    axes.set_xlabel(r"curvature: Hessian eigenvalue $\lambda_j$  [loss/$\theta^2$]")
    axes.set_ylabel(r"noise variance along it: $v_j^{\top}\Sigma\,v_j$  [loss$^2$/$\theta^2$]")
    legend(axes, len(shown) > 1)
    return figure


@styled
def variance_flatness(results: VarianceFlatness | Mapping[str, VarianceFlatness]) -> Figure:
    """Variance along the noise's principal directions against the interval flatness there, log–log, with the law."""
    figure, axes = single(5.4, 4.0)
    shown = series(results)
    for (label, result), color in zip(shown.items(), shades(len(shown)), strict=True):
        x = result.flatness.flatness.numpy()
        finite = np.isfinite(x)
        kept = [e for e, use in zip(result.variances, finite, strict=True) if use]
        law_line(axes, result.law, x, color)
        text = exponent(result.law, len(shown) == 1)
        scatter(axes, x[finite], kept, color, f"{label}:  {text}" if label else text)
    log_axis(axes, "x")
    log_axis(axes, "y")
    hollow_note(axes, [e for result in shown.values() for e in result.variances])
    axes.set_xlabel(r"interval flatness $F_i$ of the loss along $u_i$  [$\theta$]")
    axes.set_ylabel(r"noise variance: $u_i^{\top}\Sigma\,u_i$  [loss$^2$/$\theta^2$]")
    legend(axes, len(shown) > 1)
    return figure


@styled
def interval_flatness(result: IntervalFlatness) -> Figure:
    """Distances δ₋ and δ₊ at which the risk reaches the level, for each direction."""
    figure, axes = single(5.4, 3.2)
    index = np.arange(1, len(result.flatness) + 1)
    for distances, color, marker, label in (
        (result.right.numpy(), VERMILION, ">", r"$\delta_+$"),
        (result.left.numpy(), BLUE, "<", r"$\delta_-$"),
    ):
        axes.plot(index, np.where(np.isfinite(distances), distances, np.nan), marker, color=color, label=label)
    log_axis(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("direction")
    axes.set_ylabel(r"distance to the level  [$\theta$]")
    axes.set_title(f"risk {result.risk:.3g} to {result.level:.3g}")
    axes.legend(loc="best")
    return figure


@styled
def eigenpairs(pairs: Eigenpairs) -> Figure:
    """Eigenvalues with their residuals as bars; hollow where not converged."""
    figure, axes = single(5.2, 3.2)
    values, residuals = pairs.values.double().cpu().numpy(), pairs.residuals.double().cpu().numpy()
    converged = pairs.converged.cpu().numpy().astype(bool)
    index = np.arange(1, len(values) + 1)
    axes.errorbar(index, values, yerr=residuals, fmt="none", ecolor=BLUE, elinewidth=0.9, alpha=0.6)
    axes.plot(index[converged], values[converged], "o", color=BLUE, markersize=4.6, label="converged")
    if not converged.all():
        axes.plot(
            index[~converged], values[~converged], "o", color=BLUE, markerfacecolor="white", label="not converged"
        )
        axes.legend(loc="best")
    if len(values) and (values > 0).all() and values.max() > 10 * values.min():
        log_axis(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("index")
    axes.set_ylabel(r"eigenvalue (bars: residual norm)")
    return figure


@styled
def diagonal(result: DiagonalEstimate) -> Figure:
    """Entries in descending order of the estimates, each with its own 95 % interval.

    Of many entries, ranks evenly spaced in the logarithm from both ends; linear below the typical error.
    """
    figure, axes = single(5.4, 3.6)
    values, count = result.values.numpy(), len(result.values)
    low, high = (end.numpy() for end in result.interval())
    ends = np.geomspace(1, count, min(count, 400)).round().astype(int)
    ranks = np.unique(np.concatenate([ends, count + 1 - ends]))
    shown = values.argsort()[::-1][ranks - 1]
    axes.fill_between(ranks, low[shown], high[shown], color=BLUE, alpha=0.25, linewidth=0, label="95 % of each entry")
    axes.plot(ranks, values[shown], color=BLUE, marker="." if count < 50 else None)
    scale = max(float(np.median(result.stderr.numpy())), 1e-3 * float(np.abs(values).max()))
    if scale > 0.0:
        axes.set_yscale("symlog", linthresh=scale)
    if count > 20:
        axes.set_xscale("log")
    axes.set_xlabel("rank of the entry")
    axes.set_ylabel(r"diagonal entry $A_{ii}$")
    axes.legend(loc="best")
    return figure


@styled
def noise_eigenvalues(results: Sequence[Estimate] | Mapping[str, Sequence[Estimate]]) -> Figure:
    """Scree plot of the covariance of the dropout noise, with 95 % intervals."""
    figure, axes = single(5.4, 3.8)
    shown = series(results)
    for (label, estimates), color in zip(shown.items(), shades(len(shown)), strict=True):
        index = np.arange(1, len(estimates) + 1, dtype=float)
        axes.plot(index, [e.value for e in estimates], color=color, linewidth=0.8, alpha=0.6)
        scatter(axes, index, estimates, color, label)
    log_axis(axes, "x")
    log_axis(axes, "y")
    hollow_note(axes, [e for estimates in shown.values() for e in estimates])
    axes.set_xlabel(r"rank $i$")
    axes.set_ylabel(r"eigenvalue $\lambda_i(\Sigma)$ of the dropout noise  [loss$^2$/$\theta^2$]")
    if len(shown) > 1:
        legend(axes, True)
    return figure


@styled
def noise_split(
    risks: Sequence[float], dropout: Sequence[Estimate], sampling: Sequence[Estimate], labels: Sequence[str] = ()
) -> Figure:
    """Traces of the two parts of the gradient noise over training: from masks within samples, and between samples."""
    figure, axes = single(5.4, 3.6)
    x = np.asarray(risks, float)
    for estimates, color, marker, name in (
        (dropout, VERMILION, "o", r"dropout, within samples: $\mathrm{Tr}\,W$"),
        (sampling, BLUE, "s", r"sampling, between samples: $\mathrm{Tr}\,B$"),
    ):
        axes.plot(x, [e.value for e in estimates], color=color, linewidth=1.2)
        scatter(axes, x, estimates, color, name, marker)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.invert_xaxis()
    hollow_note(axes, [*dropout, *sampling])
    for position, label in zip(x, labels, strict=False):
        axes.annotate(label, (position, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7.5)
    axes.set_xlabel(r"training loss $R$, dropout off (training runs to the right)")
    axes.set_ylabel(r"noise of one sample's gradient  [loss$^2$/$\theta^2$]")
    axes.legend(loc="best", handletextpad=0.3)
    return figure


@styled
def alignment(risks: Sequence[float], results: Sequence[HessianVariance]) -> Figure:
    """Tr(HΣ)/Tr(HΣ̄) over training, and the cosine of H and Σ beside its mean over random eigenvectors."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.asarray(risks, float)
    ratios = [result.alignment.ratio for result in results]
    scatter(left, x, ratios, VERMILION, "dropout noise")
    left.plot(x, [e.value for e in ratios], color=VERMILION, linewidth=1.2)
    left.axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label="isotropic noise")
    left.set_ylabel(r"$\mathrm{Tr}(H\Sigma)\;/\;\mathrm{Tr}(H\bar\Sigma)$")
    for name, color, marker, label in (
        ("cosine", VERMILION, "o", "dropout noise"),
        ("null", BLUE, "s", "same spectra, random eigenvectors"),
    ):
        estimates = [getattr(result.alignment, name) for result in results]
        right.plot(x, [e.value for e in estimates], color=color, linewidth=1.2)
        scatter(right, x, estimates, color, label, marker)
    right.set_ylabel(r"$\mathrm{Tr}(H\Sigma)\;/\;\|H\|_F\|\Sigma\|_F$")
    for axes in (left, right):
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.invert_xaxis()
        axes.set_xlabel(r"training loss $R$")
        axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3)
    return figure


@styled
def noise_trace(result: NoiseTrace) -> Figure:
    """Tr(HΣ) beside its isotropic null, and the cosine of H and Σ beside its same-spectrum null, along training."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.array([moment.step for moment in result.moments], float)
    shown = (
        (left, "trace_product", VERMILION, "o", r"$\mathrm{Tr}(H\Sigma)$"),
        (left, "isotropic", BLUE, "s", r"$\mathrm{Tr}(H\bar\Sigma)$, isotropic null"),
        (right, "cosine", VERMILION, "o", r"cosine of $H$ and $\Sigma$"),
        (right, "null", BLUE, "s", "same spectra, random eigenvectors"),
    )
    for axes, name, color, marker, label in shown:
        estimates = [getattr(moment.alignment, name) for moment in result.moments]
        axes.plot(x, [e.value for e in estimates], color=color, linewidth=1.2)
        scatter(axes, x, estimates, color, label, marker)
    for axes in (left, right):
        log_axis(axes, "y")
        axes.set_xlabel("training step")
        axes.legend(loc="best", handletextpad=0.3)
    left.set_ylabel(r"loss$^3$/$\theta^4$")
    return figure


@styled
def spectral_density(
    results: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    top: Eigenpairs | Mapping[str, Eigenpairs] | None = None,
    **arguments: Any,
) -> Figure:
    """Density of eigenvalues, logarithmic, over signed eigenvalues; one panel for each result.

    By default the axis is linear near zero and logarithmic beyond, and the smoothing goes along: a Gaussian of fixed
    width in asinh(λ/λ₀), λ₀ a few distances between nodes. With arguments of ``SpectralDensity.curve`` the axis is
    linear. The band covers 95 % over the draw of probes. Ticks are eigenvalues known as such (``top``).
    """
    shown = series(results)
    pairs = series(top) if top is not None else {}
    figure = Figure(figsize=(5.4, 3.4 if len(shown) == 1 else 0.6 + 1.25 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    width = max(_linear_width(density) for density in shown.values())
    for axes, (label, density), color in zip(panels, shown.items(), shades(len(shown)), strict=True):
        x, mean, low, high = (
            (np.asarray(part) for part in density.curve(log=True, **arguments))
            if arguments
            else asinh_curve(density, width)
        )
        floor = 0.2 * mean[mean > 0].min() if arguments else 0.3 / (density.dim * 0.3 * np.abs(x).max())
        axes.fill_between(x, np.nan_to_num(low), np.nan_to_num(high), color=color, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=color, linewidth=1.3)
        axes.set_yscale("log")
        axes.set_ylim(floor, 4.0 * float(mean.max()))
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if label in pairs:
            values = pairs[label].values.double().cpu().numpy()
            axes.plot(values, np.full(len(values), 0.02), "|", color=VERMILION, markersize=7, markeredgewidth=0.9,
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        if label:
            axes.set_title(label, fontsize=8.5, pad=2)
        if not arguments:
            axes.set_xscale("asinh", linear_width=width)
        axes.axvline(0.0, color="#e3e6ea", linewidth=0.8, zorder=0)
    if not arguments:
        ends = [float(end(density.nodes)) for density in shown.values() for end in (torch.min, torch.max)]
        panels[-1].set_xticks(_asinh_ticks(width, min(ends), max(ends)))
        panels[-1].set_xticks([], minor=True)
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))
    panels[-1].set_xlabel(r"Hessian eigenvalue $\lambda$  [loss/$\theta^2$]")
    figure.supylabel(r"density of eigenvalues $\rho(\lambda)$  [$\theta^2$/loss]", fontsize=9.5)
    return figure


def _asinh_ticks(width: float, low: float, high: float) -> list[float]:
    """Zero, and ones and threes of each decade beyond the linear part, on both sides."""
    first, last = math.floor(math.log10(width)), math.ceil(math.log10(max(-low, high, 10.0 * width)))
    marks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1.0, 3.0)]
    marks = [mark for mark in marks if mark > 1.5 * width]
    return sorted({0.0, *(m for m in marks if m <= high), *(-m for m in marks if m <= -low)})


def _linear_width(density: SpectralDensity) -> float:
    """λ₀: eight distances between nodes where the mass sits, below which nothing is resolved."""
    nodes, weights = density.nodes.numpy(), density.weights.numpy()
    gaps = np.gradient(nodes, axis=1) if nodes.shape[1] > 1 else np.ones_like(nodes)
    return 8.0 * float((weights * np.abs(gaps)).sum() / len(nodes)) or 1.0


def asinh_curve(density: SpectralDensity, width: float, smoothing: float = 0.12) -> tuple[Vector, ...]:
    """Density per λ, smoothed by a Gaussian of width ``smoothing`` in asinh(λ/width): x, mean, low, high."""
    nodes, weights = np.arcsinh(density.nodes.numpy() / width), density.weights.numpy()
    grid = np.linspace(nodes.min() - 4 * smoothing, nodes.max() + 4 * smoothing, 900)
    bumps = np.exp(-0.5 * ((grid[None, :, None] - nodes[:, None, :]) / smoothing) ** 2)
    curves = (bumps * weights[:, None, :]).sum(2) / (smoothing * math.sqrt(2 * math.pi))
    curves = curves / (width * np.cosh(grid))  # dasinh(λ/λ₀)/dλ
    mean, count = curves.mean(0), len(curves)
    if count < 2:
        return width * np.sinh(grid), mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    relative = stats.t.isf(0.025, count - 1) * curves.std(0, ddof=1) / math.sqrt(count) / np.maximum(mean, 1e-300)
    return width * np.sinh(grid), mean, mean * np.exp(-relative), mean * np.exp(relative)
