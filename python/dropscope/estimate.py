"""A number with an error: what every stochastic measurement of dropscope returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

EstimateStatus = Literal["ok", "heavy_tailed", "no_error"]

REMEDIES: dict[str, str] = {
    "ok": "the interval's coverage has been checked for this status",
    "heavy_tailed": "fewer than 40 effective degrees of freedom: a few samples or rare masks carry the noise; "
    "the interval is too narrow, add draws",
    "no_error": "too few draws for an error (4 are needed); the value is unbiased, its error unknown",
}


@dataclass(frozen=True)
class Estimate:
    """An estimate, its standard error and the distribution of that error.

    Attributes:
        value: the estimate.
        stderr: its standard error; NaN when ``status`` is ``"no_error"``.
        dof: effective degrees of freedom ν. For a ``scale`` estimate (a variance, a trace of a covariance)
            ``ν·value/truth`` is taken as χ²(ν); otherwise ``(value-truth)/stderr`` as Student's t(ν).
        status: ``"ok"``, ``"heavy_tailed"`` (ν < 40 for a scale estimate) or ``"no_error"``.
        scale: whether the estimate is a non-negative scale.
    """

    value: float
    stderr: float
    dof: float = math.inf
    status: EstimateStatus = "ok"
    scale: bool = False

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided confidence interval at ``level``.

        Args:
            level: probability that the interval covers the truth, in (0, 1).

        Returns:
            Lower and upper end; ``(nan, nan)`` when there is no error.

        Raises:
            ValueError: if ``level`` is not in (0, 1).
        """
        if not isinstance(level, (int, float)) or not 0.0 < level < 1.0:
            raise ValueError(f"interval: level must lie in (0, 1), got {level!r}")
        tail = (1.0 - level) / 2.0
        if self.status == "no_error" or math.isnan(self.stderr):
            return math.nan, math.nan
        if self.stderr == 0.0:
            return self.value, self.value
        if self.scale and math.isfinite(self.dof):
            low, high = stats.chi2.ppf([tail, 1.0 - tail], self.dof)
            return self.dof * self.value / float(high), self.dof * self.value / float(low)
        reach = float(stats.norm.isf(tail) if math.isinf(self.dof) else stats.t.isf(tail, self.dof)) * self.stderr
        return self.value - reach, self.value + reach

    @property
    def remedy(self) -> str:
        """What the status means and what to do about it."""
        return REMEDIES[self.status]

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        error = "" if math.isnan(self.stderr) else f" ± {self.stderr:.2g}"
        status = "" if self.status == "ok" else f" [{self.status}]"
        return f"Estimate({self.value:.6g}{error}{status})"
