"""Figures: labelled, with bars where there are errors, and without a trace in matplotlib's state."""

from __future__ import annotations

import io
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dropscope import plots, spectral
from dropscope.analyses import hessian_variance, interval_flatness, variance_flatness
from dropscope.estimate import Estimate
from dropscope.operators.base import SymmetricOperator
from dropscope.plot_style import style
from dropscope.spectral import DiagonalEstimate, SpectralDensity, eigsh, spectral_density
from test_analyses import bowl

F64 = torch.float64
EYE = torch.eye(3, dtype=F64)
SCALE = torch.logspace(-1, 2, 24, dtype=F64)


def diagonal(values: torch.Tensor) -> SymmetricOperator:
    return SymmetricOperator.from_callable(lambda v: values * v, len(values), F64)


def relation():
    return hessian_variance(diagonal(SCALE), diagonal(SCALE**1.5), k=8)


def flatness():
    return variance_flatness(bowl(SCALE.tolist()), diagonal(SCALE**1.5), k=8)


def estimates(count: int = 6) -> list[Estimate]:
    return [
        Estimate(1.0 / (i + 1), 0.1 / (i + 1), 30.0 + 5 * i, "ok" if i > 1 else "heavy_tailed", scale=True)
        for i in range(count)
    ]


def entries(count: int) -> DiagonalEstimate:
    """Of a diagonal plus a constant, so that estimates from fewer products than entries have errors."""
    scale = torch.linspace(-1.0, 3.0, count, dtype=F64)
    return spectral.diagonal(SymmetricOperator.from_callable(lambda v: scale * v + 0.1 * v.sum(), count, F64), 40)


FIGURES = {
    "hessian_variance": lambda: plots.hessian_variance(relation()),
    "hessian_variance of several": lambda: plots.hessian_variance({"a": relation(), "b": relation()}),
    "variance_flatness": lambda: plots.variance_flatness({"a": flatness(), "b": flatness()}),
    "interval_flatness": lambda: plots.interval_flatness(
        interval_flatness(bowl([1.0, 9.0, 0.0]), torch.eye(3, dtype=F64))
    ),
    "eigenpairs": lambda: plots.eigenpairs(eigsh(diagonal(SCALE - 1.0), 5)),
    "diagonal": lambda: plots.diagonal(entries(300)),
    "diagonal, exact": lambda: plots.diagonal(entries(5)),
    "diagonal of zeros": lambda: plots.diagonal(
        DiagonalEstimate(torch.zeros(1, dtype=F64), torch.zeros(1), math.inf, 1)
    ),
    "noise_eigenvalues": lambda: plots.noise_eigenvalues(estimates()),
    "noise_split": lambda: plots.noise_split([2.0, 0.5, 0.1], estimates(3), estimates(3)),
    "alignment": lambda: plots.alignment([2.0, 0.1], [relation(), relation()]),
    "spectral_density": lambda: plots.spectral_density(spectral_density(diagonal(SCALE - 1.0), probes=3, steps=12)),
    "spectral_density of one probe": lambda: plots.spectral_density(spectral_density(diagonal(SCALE), 1, 12)),
    "spectral_density, linear": lambda: plots.spectral_density(spectral_density(diagonal(SCALE), 3, 12), sigma=1.0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_labelled_and_leave_matplotlib_alone(name: str) -> None:
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert dict(matplotlib.rcParams) == before
    shown = figure.get_supylabel()
    for axes in figure.axes:
        assert axes.get_ylabel() or shown
    assert any(axes.get_xlabel() for axes in figure.axes)
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    assert buffer.getvalue().startswith(b"<?xml")


def test_methods_of_results_draw_the_same_figures() -> None:
    for result in (relation(), flatness(), flatness().flatness):
        assert isinstance(result.plot(), Figure)


def test_power_laws_are_shown_on_logarithmic_axes() -> None:
    for figure in (plots.hessian_variance(relation()), plots.variance_flatness(flatness())):
        axes = figure.axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_heavy_tailed_points_are_hollow_and_explained() -> None:
    axes = plots.noise_eigenvalues(estimates()).axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in hollow] == [2]
    assert "hollow: heavy-tailed" in [line.get_label() for line in axes.lines]


def test_bars_are_the_95_percent_intervals() -> None:
    axes = plots.noise_eigenvalues(estimates()).axes[0]
    segments = axes.collections[0].get_segments()
    for segment, estimate in zip(segments, estimates(), strict=True):
        assert tuple(segment[:, 1]) == pytest.approx(estimate.interval(0.95))


def test_a_diagonal_is_drawn_in_descending_order_with_its_intervals() -> None:
    found = entries(300)
    axes = found.plot().axes[0]
    ranks, drawn = axes.lines[0].get_data()
    order = found.values.argsort(descending=True)[torch.as_tensor(ranks) - 1]
    assert (ranks[0], ranks[-1]) == (1, 300)
    np.testing.assert_array_equal(drawn, found.values[order])
    band = axes.collections[0].get_paths()[0].vertices
    low, high = found.interval()
    assert band[:, 1].min() == pytest.approx(float(low[order].min()))
    assert band[:, 1].max() == pytest.approx(float(high[order].max()))


def test_density_on_the_asinh_axis_keeps_the_mass() -> None:
    density = SpectralDensity(
        nodes=torch.tensor([[-2.0, 0.0, 30.0]] * 2, dtype=F64),
        weights=torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]], dtype=F64),
        dim=100,
        matvecs=6,
    )
    x, mean, low, high = plots.asinh_curve(density, width=0.5)
    assert np.trapezoid(mean, x) == pytest.approx(1.0, abs=1e-3)
    right = x > 5.0
    assert np.trapezoid(mean[right], x[right]) == pytest.approx(0.3, abs=1e-3)
    np.testing.assert_allclose(low, mean)
    np.testing.assert_allclose(high, mean)


def test_no_noise_is_drawn_as_none() -> None:
    nothing = hessian_variance(diagonal(SCALE), diagonal(0.0 * SCALE), k=4)
    assert math.isnan(nothing.law.slope.value)
    assert nothing.plot().axes[0].get_yscale() == "linear"
    assert isinstance(plots.noise_eigenvalues([Estimate(0.0, 0.0, scale=True)] * 3), Figure)


def test_error_bars_survive_what_has_no_error() -> None:
    nothing = [Estimate(1.0, math.nan, 0.0, "no_error", scale=True), Estimate(2.0, 0.0, scale=True)]
    assert isinstance(plots.noise_eigenvalues(nothing), Figure)
