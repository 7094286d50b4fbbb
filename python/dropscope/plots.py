"""Figures for papers: labelled axes with units, error bars on every estimate, colours that survive colour blindness.

Every function takes a result (many also take several, as a mapping from label to result) and returns a
:class:`matplotlib.figure.Figure` that belongs to nobody: no pyplot, no backend, nothing global is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError as error:  # pragma: no cover - an optional dependency
    raise ImportError("dropscope.plots needs matplotlib: pip install 'dropscope[plots]'") from error

if TYPE_CHECKING:
    from dropscope.analyses import HessianVariance, IntervalFlatness, VarianceFlatness
    from dropscope.analyses.power_law import PowerLaw
    from dropscope.estimate import Estimate
    from dropscope.spectral import Eigenpairs

Vector = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito's palette, told apart by all common forms of colour blindness.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, FAINT = "#1a1a1a", "#8a8f98"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "mathtext.fontset": "cm",
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4a4f57",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.dpi": 150,
    "svg.fonttype": "path",
    "svg.hashsalt": "dropscope",
}


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run with the style of this module, leaving matplotlib's settings as they were."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return run


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings of every figure here; open it also around ``figure.savefig``."""
    with matplotlib.rc_context(cast("Any", STYLE)):
        yield


def shades(count: int) -> list[Any]:
    """Colours for a sequence, dark to light, of even lightness steps."""
    ramp = matplotlib.colormaps["viridis"]
    return [ramp(x) for x in np.linspace(0.0, 0.86, count)] if count > 1 else [matplotlib.colors.to_rgba(BLUE)]


def series(results: Any) -> dict[str, Any]:
    """One result, or a mapping of them, as a mapping."""
    return dict(results) if isinstance(results, Mapping) else {"": results}


def single(width: float = 5.2, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Log scale with a light grid at decades; at least a decade is shown."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(numticks=9))
    axis.set_minor_formatter(NullFormatter())
    low, high = getattr(axes, f"get_{which}lim")()
    if 0.0 < low < high < 10.0 * low:
        middle = math.sqrt(low * high)
        getattr(axes, f"set_{which}lim")(middle / math.sqrt(10.0), middle * math.sqrt(10.0))
    axes.grid(True, which="major", axis=which, color="#e3e6ea", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _bars(estimates: Sequence[Estimate]) -> tuple[Vector, Vector]:
    """Values and distances to the ends of the 95 % intervals, (2, k), for ``errorbar``; zero where unknown."""
    values = np.array([e.value for e in estimates])
    ends = np.array([e.interval(0.95) for e in estimates], float).reshape(-1, 2)
    reach = np.vstack([values - ends[:, 0], ends[:, 1] - values])
    return values, np.nan_to_num(np.maximum(reach, 0.0), posinf=0.0)


def _scatter(axes: Axes, x: Vector, estimates: Sequence[Estimate], color: Any, label: str, marker: str = "o") -> None:
    """Points with 95 % bars; hollow where the interval is not to be trusted."""
    values, reach = _bars(estimates)
    trusted = np.array([e.status == "ok" for e in estimates], bool)
    axes.errorbar(x, values, yerr=reach, fmt="none", ecolor=color, elinewidth=0.9, alpha=0.55, zorder=2)
    common: dict[str, Any] = {
        "linestyle": "none",
        "marker": marker,
        "markersize": 4.6,
        "markeredgewidth": 1.0,
        "zorder": 3,
    }
    axes.plot(x[trusted], values[trusted], markerfacecolor=color, markeredgecolor="white", **common)
    axes.plot(x[~trusted], values[~trusted], markerfacecolor="white", markeredgecolor=color, **common)
    shown_hollow = not trusted.any()
    axes.plot(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=4.6,
        markerfacecolor="white" if shown_hollow else color,
        markeredgecolor=color,
        label=label,
    )


def _law(axes: Axes, law: PowerLaw, x: Vector, color: Any) -> None:
    """The fitted line over the points that entered the fit."""
    x = x[np.isfinite(x) & (x > 0)]
    if law.points >= 3 and math.isfinite(law.slope.value):
        ends = np.geomspace(x.min() / 1.15, x.max() * 1.15, 2)
        axes.plot(ends, law(ends), color=color, linewidth=1.2, alpha=0.9, zorder=1.5)


def _exponent(law: PowerLaw) -> str:
    if not math.isfinite(law.slope.value):
        return "no fit"
    return rf"$s={law.slope.value:.2f}\pm{law.slope.stderr:.2f}$, $r={law.r:.2f}$"


def _hollow_note(axes: Axes, estimates: Sequence[Estimate]) -> None:
    if any(e.status == "heavy_tailed" for e in estimates):
        axes.plot(
            [], [], "o", markersize=4.6, markerfacecolor="white", markeredgecolor=FAINT, label="hollow: heavy-tailed"
        )


@_styled
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
        _law(axes, result.law, x, color)
        text = _exponent(result.law)
        _scatter(axes, x[positive], kept, color, f"{label}:  {text}" if label else text)
    log_axis(axes, "x")
    log_axis(axes, "y")
    if len(shown) == 1:
        result = next(iter(shown.values()))
        level = result.alignment.trace_noise.value / result.dim
        axes.axhline(level, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label="isotropic noise of equal trace")
    _hollow_note(axes, [e for result in shown.values() for e in result.variances])
    axes.set_xlabel(r"curvature: Hessian eigenvalue $\lambda_j$  [loss/$\theta^2$]")
    axes.set_ylabel(r"noise variance along it: $v_j^{\top}\Sigma\,v_j$  [loss$^2$/$\theta^2$]")
    axes.legend(loc="best", handletextpad=0.3)
    return figure


@_styled
def variance_flatness(results: VarianceFlatness | Mapping[str, VarianceFlatness]) -> Figure:
    """Variance along the noise's principal directions against the interval flatness there, log–log, with the law."""
    figure, axes = single(5.4, 4.0)
    shown = series(results)
    for (label, result), color in zip(shown.items(), shades(len(shown)), strict=True):
        x = result.flatness.flatness.numpy()
        finite = np.isfinite(x)
        kept = [e for e, use in zip(result.variances, finite, strict=True) if use]
        _law(axes, result.law, x, color)
        text = _exponent(result.law)
        _scatter(axes, x[finite], kept, color, f"{label}:  {text}" if label else text)
    log_axis(axes, "x")
    log_axis(axes, "y")
    _hollow_note(axes, [e for result in shown.values() for e in result.variances])
    axes.set_xlabel(r"interval flatness $F_i$ of the loss along $u_i$  [$\theta$]")
    axes.set_ylabel(r"noise variance: $u_i^{\top}\Sigma\,u_i$  [loss$^2$/$\theta^2$]")
    axes.legend(loc="best", handletextpad=0.3)
    return figure


@_styled
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
    axes.set_xlabel("direction")
    axes.set_ylabel(r"distance to the level  [$\theta$]")
    axes.set_title(f"risk {result.risk:.3g} to {result.level:.3g}")
    axes.legend(loc="best")
    return figure


@_styled
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
    axes.set_xlabel("index")
    axes.set_ylabel(r"eigenvalue (bars: residual norm)")
    return figure


@_styled
def noise_eigenvalues(results: Sequence[Estimate] | Mapping[str, Sequence[Estimate]]) -> Figure:
    """Scree plot of the covariance of the dropout noise, with 95 % intervals."""
    figure, axes = single(5.4, 3.8)
    shown = series(results)
    for (label, estimates), color in zip(shown.items(), shades(len(shown)), strict=True):
        index = np.arange(1, len(estimates) + 1, dtype=float)
        axes.plot(index, [e.value for e in estimates], color=color, linewidth=0.8, alpha=0.6)
        _scatter(axes, index, estimates, color, label)
    log_axis(axes, "x")
    log_axis(axes, "y")
    _hollow_note(axes, [e for estimates in shown.values() for e in estimates])
    axes.set_xlabel(r"rank $i$")
    axes.set_ylabel(r"eigenvalue $\lambda_i(\Sigma)$ of the dropout noise  [loss$^2$/$\theta^2$]")
    if len(shown) > 1:
        axes.legend(loc="best", handletextpad=0.3)
    return figure


@_styled
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
        _scatter(axes, x, estimates, color, name, marker)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.invert_xaxis()
    _hollow_note(axes, [*dropout, *sampling])
    for position, label in zip(x, labels, strict=False):
        axes.annotate(label, (position, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7.5)
    axes.set_xlabel(r"training loss $R$, dropout off (training runs to the right)")
    axes.set_ylabel(r"noise of one sample's gradient  [loss$^2$/$\theta^2$]")
    axes.legend(loc="best", handletextpad=0.3)
    return figure


@_styled
def alignment(risks: Sequence[float], results: Sequence[HessianVariance]) -> Figure:
    """Tr(HΣ)/Tr(HΣ̄) over training, and the cosine of H and Σ beside its mean over random eigenvectors."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.asarray(risks, float)
    ratios = [result.alignment.ratio for result in results]
    _scatter(left, x, ratios, VERMILION, "dropout noise")
    left.plot(x, [e.value for e in ratios], color=VERMILION, linewidth=1.2)
    left.axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label="isotropic noise")
    left.set_ylabel(r"$\mathrm{Tr}(H\Sigma)\;/\;\mathrm{Tr}(H\bar\Sigma)$")
    for name, color, marker, label in (
        ("cosine", VERMILION, "o", "dropout noise"),
        ("null", BLUE, "s", "same spectra, random eigenvectors"),
    ):
        estimates = [getattr(result.alignment, name) for result in results]
        right.plot(x, [e.value for e in estimates], color=color, linewidth=1.2)
        _scatter(right, x, estimates, color, label, marker)
    right.set_ylabel(r"$\mathrm{Tr}(H\Sigma)\;/\;\|H\|_F\|\Sigma\|_F$")
    for axes in (left, right):
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.invert_xaxis()
        axes.set_xlabel(r"training loss $R$")
        axes.legend(loc="best", handletextpad=0.3)
    return figure
