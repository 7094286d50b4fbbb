"""Fit of a power law y ~ x^s to points that carry measurement errors and scatter about the law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from dropscope.estimate import Estimate

Points = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """The law y = prefactor · x^slope fitted in log–log coordinates.

    Attributes:
        slope: the exponent s; its error is Student's t with ``points - 2`` degrees of freedom.
        prefactor: the value of the law at x = 1.
        scatter: standard deviation of ln y about the law beyond what the measurement errors explain.
        r: Pearson correlation of ln x and ln y.
        spearman: rank correlation of x and y.
        points: how many points entered the fit (both coordinates positive and finite).
        left_out: how many points did not.
    """

    slope: Estimate
    prefactor: float
    scatter: float
    r: float
    spearman: float
    points: int
    left_out: int

    def __call__(self, x: Points) -> npt.NDArray[np.float64]:
        """Evaluate the law at ``x``."""
        return np.asarray(self.prefactor * np.power(np.asarray(x, float), self.slope.value), float)

    def __repr__(self) -> str:
        return (
            f"PowerLaw(slope {self.slope.value:.2f} ± {self.slope.stderr:.2f}, r {self.r:.2f}, "
            f"Spearman {self.spearman:.2f}, {self.points} points)"
        )


def fit_power_law(x: Points, y: Points, y_stderr: Points | None = None) -> PowerLaw:
    """Fit ln y = ln c + s·ln x + scatter + error.

    Points off a law are seldom explained by their measurement errors alone, so a weighted fit by those errors claims
    too much. The weights are 1/(σⱼ² + τ²), σⱼ = stderr/y the error of ln yⱼ and τ² the variance of the scatter, the
    root of Σ residualⱼ²/(σⱼ² + τ²) = points − 2 (Mandel and Paule), or 0 where the errors explain all.

    Args:
        x: abscissae, taken as exact.
        y: ordinates.
        y_stderr: standard errors of y; zero (or None, or NaN for a single point) where unknown.

    Returns:
        The law. With fewer than 3 usable points every number is NaN and the slope's status ``"no_error"``.

    Raises:
        ValueError: if the lengths differ.

    Example:
        >>> fit_power_law([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0])
        PowerLaw(slope 2.00 ± 0.00, r 1.00, Spearman 1.00, 4 points)
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    errors = np.zeros_like(ys) if y_stderr is None else np.nan_to_num(np.asarray(y_stderr, float))
    if not xs.shape == ys.shape == errors.shape or xs.ndim != 1:
        raise ValueError(
            "fit_power_law: x, y and y_stderr must be vectors of one length, "
            f"got {xs.shape}, {ys.shape} and {errors.shape}"
        )
    usable = np.isfinite(xs) & np.isfinite(ys) & (xs > 0) & (ys > 0)
    count, left_out = int(usable.sum()), int((~usable).sum())
    if count < 3 or np.ptp(xs[usable]) == 0.0:
        nothing = Estimate(math.nan, math.nan, 0.0, "no_error")
        return PowerLaw(nothing, math.nan, math.nan, math.nan, math.nan, count, left_out)
    u, v = np.log(xs[usable]), np.log(ys[usable])
    variance = (errors[usable] / ys[usable]) ** 2
    scatter2 = _scatter(u, v, variance)
    intercept, slope, covariance, _ = _weighted_line(u, v, variance + scatter2)
    flat = bool(np.ptp(v) == 0.0)
    return PowerLaw(
        slope=Estimate(slope, math.sqrt(covariance), float(count - 2)),
        prefactor=math.exp(intercept),
        scatter=math.sqrt(scatter2),
        r=math.nan if flat else float(stats.pearsonr(u, v).statistic),
        spearman=math.nan if flat else float(stats.spearmanr(u, v).statistic),
        points=count,
        left_out=left_out,
    )


def _weighted_line(
    u: npt.NDArray[np.float64], v: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Intercept, slope, variance of the slope, and χ² of the least-squares line."""
    variance = np.maximum(variance, max(1e-12 * float(variance.max()), 1e-300))  # exact points get a finite weight
    weight = variance.min() / variance
    centre = float(np.average(u, weights=weight))
    spread = float(np.sum(weight * (u - centre) ** 2))
    slope = float(np.sum(weight * (u - centre) * v)) / spread
    intercept = float(np.average(v, weights=weight)) - slope * centre
    chi2 = float(np.sum((v - intercept - slope * u) ** 2 / variance))
    return intercept, slope, float(variance.min()) / spread, chi2


def _scatter(u: npt.NDArray[np.float64], v: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]) -> float:
    """The variance τ² of the scatter beyond the measurement errors."""
    freedom = len(u) - 2

    def surplus(tau2: float) -> float:
        return _weighted_line(u, v, variance + tau2)[3] - freedom

    ceiling = float(np.var(v)) * len(u) / freedom
    floor = 1e-12 * ceiling
    if np.ptp(v) == 0.0 or surplus(floor) <= 0.0:
        return 0.0
    return float(optimize.brentq(surplus, floor, ceiling * (1.0 + 1e-9), xtol=1e-9 * ceiling))
