"""The look that all figures share: type, colours, axes, points with bars."""

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
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import FuncFormatter as FuncFormatter
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import NullFormatter as NullFormatter
except ImportError as error:  # pragma: no cover - an optional dependency
    raise ImportError("dropscope.plots needs matplotlib: pip install 'dropscope[plots]'") from error

if TYPE_CHECKING:
    from dropscope.analyses.power_law import PowerLaw
    from dropscope.estimate import Estimate

Vector = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")

# Two of Okabe and Ito's palette, told apart by all common forms of colour blindness.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, FAINT = "#1a1a1a", "#8a8f98"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "mathtext.fontset": "dejavusans",
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
    "pdf.fonttype": 42,
    "svg.hashsalt": "dropscope",
}


def styled(function: Callable[P, R]) -> Callable[P, R]:
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
    return [ramp(x) for x in np.linspace(0.0, 0.8, count)] if count > 1 else [matplotlib.colors.to_rgba(BLUE)]


def series(results: Any) -> dict[str, Any]:
    """One result, or a mapping of them, as a mapping."""
    return dict(results) if isinstance(results, Mapping) else {"": results}


def single(width: float = 5.2, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Log scale with a light grid at decades, or at 1, 2 and 5 where few decades are shown; at least one is.

    Where nothing is positive the scale stays linear.
    """
    if not math.isfinite(getattr(axes.dataLim, f"minpos{which}")):
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(numticks=9))
    axis.set_minor_formatter(NullFormatter())
    low, high = getattr(axes, f"get_{which}lim")()
    if 0.0 < low < high < 10.0 * low:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10.0), middle * math.sqrt(10.0)
        getattr(axes, f"set_{which}lim")(low, high)
    if 0.0 < low < high < 150.0 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        if low > 1e-3 and high < 1e4:
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(True, which="major", axis=which, color="#e3e6ea", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _bars(estimates: Sequence[Estimate]) -> tuple[Vector, Vector]:
    """Values and distances to the ends of the 95 % intervals, (2, k), for ``errorbar``; zero where unknown."""
    values = np.array([e.value for e in estimates])
    ends = np.array([e.interval(0.95) for e in estimates], float).reshape(-1, 2)
    reach = np.vstack([values - ends[:, 0], ends[:, 1] - values])
    return values, np.nan_to_num(np.maximum(reach, 0.0), posinf=0.0)


def scatter(axes: Axes, x: Vector, estimates: Sequence[Estimate], color: Any, label: str, marker: str = "o") -> None:
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


def law_line(axes: Axes, law: PowerLaw, x: Vector, color: Any) -> None:
    """The fitted line over the points that entered the fit."""
    x = x[np.isfinite(x) & (x > 0)]
    if law.points >= 3 and math.isfinite(law.slope.value):
        ends = np.geomspace(x.min() / 1.15, x.max() * 1.15, 2)
        axes.plot(ends, law(ends), color=color, linewidth=1.2, alpha=0.9, zorder=1.5)


def exponent(law: PowerLaw, with_r: bool) -> str:
    """The fitted exponent as a label."""
    if not math.isfinite(law.slope.value):
        return "no fit"
    text = rf"$s={law.slope.value:.2f}\pm{law.slope.stderr:.2f}$"
    return rf"{text}, $r={law.r:.2f}$" if with_r else text


def legend(axes: Axes, several: bool) -> None:
    """Inside for one series; above the axes, out of the way of the points, for several."""
    if several:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handletextpad=0.2, columnspacing=1.2)
    else:
        axes.legend(loc="best", handletextpad=0.3)


def hollow_note(axes: Axes, estimates: Sequence[Estimate]) -> None:
    """A legend entry for hollow points, where there are any."""
    if any(e.status == "heavy_tailed" for e in estimates):
        axes.plot(
            [], [], "o", markersize=4.6, markerfacecolor="white", markeredgecolor=FAINT, label="hollow: heavy-tailed"
        )
