"""Interval flatness: how far one can walk along a direction before the risk has doubled."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from scipy import optimize
from torch import Tensor
from tqdm.auto import tqdm

from dropscope.analyses.saving import save_result
from dropscope.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SideStatus = Literal["ok", "no_crossing", "below_range", "zero_loss"]

REMEDIES: dict[str, str] = {
    "ok": "the risk crosses the level here",
    "no_crossing": "the risk stays below the level within the range; the flatness is infinite as far as was looked",
    "below_range": "the risk is above the level already at the smallest distance; lower the range",
    "zero_loss": "the risk at the base point is not positive, so that a multiple of it is no level; give level=",
}


@dataclass(frozen=True)
class IntervalFlatness:
    """F_v = δ₊ + δ₋ with R(θ₀ + δ₊v) = R(θ₀ - δ₋v) = level, for each direction v.

    Attributes:
        flatness: F_v, float64 (k,); infinite where a side has no crossing, NaN where there is no level.
        left: δ₋, float64 (k,), in units of the parameters (the directions have length one).
        right: δ₊, float64 (k,).
        status_left: for each direction ``"ok"``, ``"no_crossing"``, ``"below_range"`` or ``"zero_loss"``.
        status_right: the same for the right side.
        risk: R(θ₀), dropout off.
        level: the risk at the ends.
        factor: level / risk when it was asked for as a multiple, else NaN.
        evaluations: how many times the risk was evaluated on the whole data set.
    """

    flatness: Tensor
    left: Tensor
    right: Tensor
    status_left: tuple[SideStatus, ...]
    status_right: tuple[SideStatus, ...]
    risk: float
    level: float
    factor: float
    evaluations: int

    @property
    def status(self) -> SideStatus:
        """The worst status of any side."""
        order: tuple[SideStatus, ...] = ("ok", "no_crossing", "below_range", "zero_loss")
        return max((*self.status_left, *self.status_right), key=order.index, default="ok")

    @property
    def remedy(self) -> str:
        """What the status means and what to do about it."""
        return REMEDIES[self.status]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result; the ending chooses JSON or safetensors."""
        return save_result(path, self)

    def plot(self) -> Figure:
        """Return a figure: distance to the level on both sides of each direction."""
        from dropscope import plots

        return plots.interval_flatness(self)

    def __repr__(self) -> str:
        finite = self.flatness[torch.isfinite(self.flatness)]
        span = f"F {float(finite.min()):.3g} to {float(finite.max()):.3g}" if len(finite) else "no finite F"
        return (
            f"IntervalFlatness({len(self.flatness)} directions, {span}, R {self.risk:.4g} -> {self.level:.4g}, "
            f"{self.status})"
        )


def interval_flatness(
    problem: Problem,
    V: Tensor,
    factor: float = 2.0,
    *,
    level: float | None = None,
    reach: tuple[float, float] = (1e-6, 1e3),
    rtol: float = 1e-3,
    progress: bool = False,
) -> IntervalFlatness:
    """Distance between the two points along ±v where the risk R (dropout off) has grown to ``factor`` times R(θ₀).

    The interval flatness of Feng and Tu as used for dropout in arXiv:2111.01022 and arXiv:2305.15850 (§5.2 there):
    F_v = θ_r - θ_l, R(θ₀ + δv) = 2 R(θ₀) at both ends; Feng and Tu took the factor e. Each end is bracketed between
    neighbours of a grid of factor-two steps that starts below a quadratic prediction, then found by Brent's method in
    ln δ. Where the risk is not monotone along v, that is the first crossing on the grid.

    Args:
        problem: the risk; its parameters are moved and put back bit for bit.
        V: directions, (dim,) or (dim, k) columns, of the problem's dtype; they are scaled to length one.
        factor: level / R(θ₀), > 1.
        level: the level itself, in units of the loss, instead of a multiple; > R(θ₀).
        reach: smallest and largest distance looked at, in units of the parameters.
        rtol: relative accuracy of a distance, in (0, 0.1].
        progress: show a bar.

    Returns:
        Flatness, left and right distances with a status each. A side without a crossing is infinite, not an error; a
        risk of zero at θ₀ gives NaN and the status ``"zero_loss"``.

    Raises:
        TypeError: if problem is not a Problem, or V not a tensor of its dtype.
        ValueError: if V has another length, a zero or non-finite column, or factor, level, reach or rtol are out of
            range.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"interval_flatness: problem must be a Problem, got {type(problem).__name__}")
    V = _directions(problem, V)
    if not factor > 1.0 or not math.isfinite(factor):
        raise ValueError(f"interval_flatness: factor must be a finite number > 1, got {factor!r}")
    if not 0.0 < reach[0] < reach[1] < math.inf:
        raise ValueError(f"interval_flatness: reach must be 0 < smallest < largest < inf, got {reach!r}")
    if not 0.0 < rtol <= 0.1:
        raise ValueError(f"interval_flatness: rtol must lie in (0, 0.1], got {rtol!r}")
    risk = problem.risk()
    if level is not None and not risk < level < math.inf:
        raise ValueError(f"interval_flatness: level must be finite and exceed the risk {risk:.6g}, got {level!r}")
    walk = _Walk(problem, risk, factor * risk if level is None else level, reach, rtol)
    columns = V.shape[1]
    if level is None and risk <= 0.0:
        nothing = torch.full((columns,), math.nan, dtype=torch.float64)
        zero: list[SideStatus] = ["zero_loss"] * columns
        return IntervalFlatness(nothing, nothing, nothing, tuple(zero), tuple(zero), risk, math.nan, factor, 1)
    ends: list[tuple[float, SideStatus]] = []
    with tqdm(total=2 * columns, desc="interval flatness", unit="side", disable=not progress, leave=False) as bar:
        for v in V.unbind(1):
            for sign in (-1.0, 1.0):
                ends.append(walk.crossing(sign * v))
                bar.set_postfix(delta=f"{ends[-1][0]:.3g}", refresh=False)
                bar.update()
    distances = torch.tensor([distance for distance, _ in ends], dtype=torch.float64).reshape(columns, 2)
    return IntervalFlatness(
        flatness=distances.sum(1),
        left=distances[:, 0].clone(),
        right=distances[:, 1].clone(),
        status_left=tuple([status for _, status in ends[::2]]),
        status_right=tuple([status for _, status in ends[1::2]]),
        risk=risk,
        level=walk.level,
        factor=factor if level is None else math.nan,
        evaluations=1 + walk.evaluations,
    )


def _directions(problem: Problem, V: Any) -> Tensor:
    """V as checked unit columns."""
    if not isinstance(V, Tensor) or V.dtype != problem.dtype:
        seen = V.dtype if isinstance(V, Tensor) else type(V).__name__
        raise TypeError(f"interval_flatness: V must be a torch.Tensor of dtype {problem.dtype}, got {seen}")
    if V.ndim not in (1, 2) or V.shape[0] != problem.dim:
        raise ValueError(
            f"interval_flatness: V must have shape ({problem.dim},) or ({problem.dim}, k), got {tuple(V.shape)}"
        )
    V = V.detach().to(problem.device).reshape(problem.dim, -1)
    lengths = V.norm(dim=0)
    if not bool(((lengths > 0) & torch.isfinite(lengths)).all()):
        raise ValueError(f"interval_flatness: V must have finite columns of positive length, got {lengths.tolist()}")
    columns: Tensor = V / lengths
    return columns


@dataclass
class _Walk:
    """Risks along rays from the base point."""

    problem: Problem
    risk: float
    level: float
    reach: tuple[float, float]
    rtol: float
    evaluations: int = 0
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        squares = sum(float(p.detach().double().square().sum()) for p in self.problem.params.values())
        self.scale = 1e-2 * math.sqrt(squares) or 1.0

    def excess(self, v: Tensor, distance: float) -> float:
        """R(θ₀ + distance·v) - level; infinite where the risk overflows."""
        self.evaluations += 1
        total = 0.0
        with self.problem.displaced(distance * v), torch.no_grad():
            for batch in self.problem.batches():
                total += float(self.problem.sample_losses(batch)[0].double().sum())
        # Far out the loss may well overflow: that is above any level, not an error.
        return total / self.problem.total_weight - self.level if math.isfinite(total) else math.inf

    def crossing(self, v: Tensor) -> tuple[float, SideStatus]:
        """The distance along v at which the risk reaches the level."""
        low, high = self.reach
        distance = 0.5 * self._predict(v)
        above = self.excess(v, distance)
        while above > 0.0 and distance > low:
            distance = max(distance / 2.0, low)
            above = self.excess(v, distance)
        if above > 0.0:
            return math.nan, "below_range"
        while True:
            if distance >= high:
                return math.inf, "no_crossing"
            inner, inner_excess = distance, above
            distance = min(2.0 * distance, high)
            above = self.excess(v, distance)
            if above > 0.0:
                return self._refine(lambda d: self.excess(v, d), (inner, inner_excess), (distance, above)), "ok"

    def _predict(self, v: Tensor) -> float:
        """Where a parabola through R(θ₀) and the last point reaches the level, three times over."""
        low, high = self.reach
        distance = min(max(self.scale, low), high)
        for _ in range(3):
            rise = self.excess(v, distance) + self.level - self.risk
            if rise <= 0.0:
                step = 4.0
            elif math.isinf(rise):
                step = 1.0 / 16.0
            else:
                step = min(max(math.sqrt((self.level - self.risk) / rise), 1.0 / 64.0), 64.0)
            distance = min(max(distance * step, low), high)
            if 0.8 < step < 1.25:
                break
        return distance

    def _refine(
        self, excess: Callable[[float], float], inner: tuple[float, float], outer: tuple[float, float]
    ) -> float:
        """Brent's method in ln δ on ln(R/level)-like values, which are nearer to a line than R itself."""
        known = {math.log(inner[0]): inner[1], math.log(outer[0]): outer[1]}

        def value(t: float) -> float:
            seen = known[t] if t in known else excess(math.exp(t))
            return math.asinh(min(seen, 1e300) / (self.level - self.risk))

        if inner[1] == 0.0:
            return inner[0]
        return math.exp(float(optimize.brentq(value, min(known), max(known), xtol=self.rtol, rtol=1e-12)))
