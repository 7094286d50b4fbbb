"""Figures of losses: along lines and planes, along simulated paths, and of the neurons' orientations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dropscope.plot_style import (
    BLUE,
    FAINT,
    Figure,
    law_line,
    log_axis,
    scatter,
    series,
    shades,
    single,
    styled,
)

if TYPE_CHECKING:
    from dropscope.analyses import Condensation, LossLine, LossPlane
    from dropscope.training.sde import Paths, WeakErrors


@styled
def condensation(result: Condensation) -> Figure:
    """Amplitude against orientation, and the cosines between the neurons that count, ordered by group."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    angles, amplitudes, active = result.angles, result.amplitudes.numpy(), result.active.numpy()
    x = (result.leading_cosine if angles is None else angles).numpy()
    left.plot(
        x[~active], amplitudes[~active], ".", color=FAINT, markersize=3, label=f"below {result.floor:g} of the largest"
    )
    left.plot(x[active], amplitudes[active], "o", color=BLUE, markersize=4, markeredgecolor="white", label="counted")
    left.set_xlabel("orientation of (w, b)  [rad]" if angles is not None else "cosine with the strongest neuron")
    left.set_ylabel("amplitude / largest")
    left.set_title(f"{result.orientations} orientations, {int(active.sum())} neurons")
    left.legend(loc="best")
    order = result.groups[result.active].argsort(stable=True)
    image = right.imshow(
        result.cosines.numpy()[order][:, order], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"
    )
    figure.colorbar(image, ax=right, label="cosine")
    right.set_xlabel("neuron, by group")
    return figure


@styled
def loss_line(results: LossLine | Mapping[str, LossLine]) -> Figure:
    """Risk along lines; with several random directions their mean and, as a band, their range."""
    figure, axes = single(5.2, 3.6)
    shown = series(results)
    for (label, result), color in zip(shown.items(), shades(len(shown)), strict=True):
        x, losses = result.alphas.numpy(), result.losses.numpy()
        axes.plot(x, losses.mean(0), color=color, label=label or None)
        if len(losses) > 1:
            axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
        if result.between:
            for end in (0.0, 1.0):
                axes.axvline(end, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel("risk, dropout off")
    if any(shown):
        axes.legend(loc="best")
    return figure


@styled
def loss_plane(result: LossPlane) -> Figure:
    """Contours of the risk on a plane, on a log scale where it is positive throughout."""
    figure, axes = single(5.0, 4.0)
    losses = result.losses.T.numpy()
    finite = losses[np.isfinite(losses)]
    positive = finite.min() > 0.0
    shown = np.log10(losses) if positive else losses
    image = axes.contourf(result.alphas.numpy(), result.betas.numpy(), shown, levels=24, cmap="viridis")
    figure.colorbar(image, ax=axes, label=r"$\log_{10}$ risk" if positive else "risk")
    axes.plot([0.0], [0.0], "+", color="white", markersize=9)
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(r"$\beta$")
    return figure


@styled
def path_risks(results: Paths | Mapping[str, Paths]) -> Figure:
    """Risk along simulated paths: the mean, and two standard errors of it as a band."""
    figure, axes = single(5.2, 3.4)
    shown = series(results)
    for (label, result), color in zip(shown.items(), shades(len(shown)), strict=True):
        t, risk = result.times.numpy(), result.risk.numpy()
        mean, error = risk.mean(1), 2.0 * risk.std(1) / math.sqrt(risk.shape[1])
        axes.plot(t, mean, "o-" if len(t) < 3 else "-", color=color, label=label or result.process)
        axes.fill_between(t, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    log_axis(axes, "y")
    axes.set_xlabel(r"time  $t=\varepsilon\cdot$step")
    axes.set_ylabel("risk, dropout off")
    axes.legend(loc="best")
    return figure


@styled
def weak_errors(results: Mapping[str, WeakErrors]) -> Figure:
    """Weak errors against the learning rate, log–log, with two standard errors and the fitted slopes."""
    figure, axes = single(5.2, 3.6)
    for (label, result), color in zip(results.items(), shades(len(results)), strict=True):
        x = np.array(result.epsilons)
        text = rf"{label}: slope ${result.law.slope.value:.2f}\pm{result.law.slope.stderr:.2f}$"
        law_line(axes, result.law, x, color)
        scatter(axes, x, result.errors, color, text)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set_xlabel(r"learning rate $\varepsilon$")
    axes.set_ylabel(r"$\|E\,\Theta_T-E\,\theta_{T/\varepsilon}\|_2$")
    axes.legend(loc="best")
    return figure
