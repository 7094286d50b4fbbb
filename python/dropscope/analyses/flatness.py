"""Interval flatness: how far one can walk along a direction before the risk has doubled."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dropscope.analyses.displaced_risks import DisplacedRisks
from dropscope.analyses.saving import Result
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
class IntervalFlatness(Result):
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
        route: how many displacements were evaluated at once, or why one by one.
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
    route: str

    @property
    def status(self) -> SideStatus:
        """The worst status of any side."""
        order: tuple[SideStatus, ...] = ("ok", "no_crossing", "below_range", "zero_loss")
        return max((*self.status_left, *self.status_right), key=order.index, default="ok")

    @property
    def remedy(self) -> str:
        """What the status means and what to do about it."""
        return REMEDIES[self.status]

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
    neighbours of a grid of factor-two steps that starts below a quadratic prediction, then found by Chandrupatla's
    method in ln δ. Where the risk is not monotone along v, that is the first crossing on the grid. All sides of all
    directions are searched in lockstep, their risks evaluated together where the model allows it and it pays; the two
    ways differ by rounding, which may move a distance within rtol.

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
    given, level = level, factor * risk if level is None else level
    columns = V.shape[1]
    if given is None and risk <= 0.0:
        nothing = torch.full((columns,), math.nan, dtype=torch.float64)
        zero: list[SideStatus] = ["zero_loss"] * columns
        return IntervalFlatness(nothing, nothing, nothing, tuple(zero), tuple(zero), risk, math.nan, factor, 1, "none")
    risks = DisplacedRisks(problem, V)
    ends = _walk(problem, risks, level, risk, reach, rtol, progress)
    distances = torch.tensor([distance for distance, _ in ends], dtype=torch.float64).reshape(columns, 2)
    return IntervalFlatness(
        flatness=distances.sum(1),
        left=distances[:, 0].clone(),
        right=distances[:, 1].clone(),
        status_left=tuple([status for _, status in ends[::2]]),
        status_right=tuple([status for _, status in ends[1::2]]),
        risk=risk,
        level=level,
        factor=factor if given is None else math.nan,
        evaluations=1 + risks.evaluations,
        route=risks.route,
    )


def _walk(
    problem: Problem,
    risks: DisplacedRisks,
    level: float,
    risk: float,
    reach: tuple[float, float],
    rtol: float,
    progress: bool,
) -> list[tuple[float, SideStatus]]:
    """Both ends along every column, left before right, all searched in lockstep."""
    squares = sum(float(p.detach().double().square().sum()) for p in problem.params.values())
    start, columns = 1e-2 * math.sqrt(squares) or 1.0, risks.V.shape[1]
    searches = [_search(start, reach, level - risk, rtol) for _ in range(2 * columns)]
    asked = {side: next(search) for side, search in enumerate(searches)}
    ends: dict[int, tuple[float, SideStatus]] = {}
    with tqdm(total=2 * columns, desc="interval flatness", unit="side", disable=not progress, leave=False) as bar:
        while asked:
            C = torch.zeros(columns, len(asked), dtype=torch.float64)
            for j, (side, distance) in enumerate(asked.items()):
                C[side // 2, j] = distance if side % 2 else -distance
            for side, value in zip(list(asked), risks(C).tolist(), strict=True):
                # Far out the loss may well overflow: that is above any level, not an error.
                answer = _send(searches[side], value - level if math.isfinite(value) else math.inf)
                if isinstance(answer, tuple):
                    ends[side] = answer
                    del asked[side]
                    bar.set_postfix(delta=f"{ends[side][0]:.3g}", refresh=False)
                    bar.update()
                else:
                    asked[side] = answer
    return [ends[side] for side in range(2 * columns)]


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


Search = Generator[float, float, tuple[float, SideStatus]]  # asks for a distance, is sent R - level there


def _search(predicted: float, reach: tuple[float, float], rise: float, rtol: float) -> Search:
    """The distance at which the risk reaches the level, ``rise`` above R(θ₀), along one ray."""
    low, high = reach
    distance = 0.5 * (yield from _predict(predicted, reach, rise))
    above = yield distance
    while above > 0.0 and distance > low:
        distance = max(distance / 2.0, low)
        above = yield distance
    if above > 0.0:
        return math.nan, "below_range"
    while True:
        if distance >= high:
            return math.inf, "no_crossing"
        inner, inner_above = distance, above
        distance = min(2.0 * distance, high)
        above = yield distance
        if above > 0.0:
            return (yield from _refine((inner, inner_above), (distance, above), rise, rtol)), "ok"


def _send(search: Search, excess: float) -> float | tuple[float, SideStatus]:
    """The next distance that a search asks for, or what it has found."""
    try:
        return search.send(excess)
    except StopIteration as found:
        end: tuple[float, SideStatus] = found.value
        return end


def _predict(distance: float, reach: tuple[float, float], rise: float) -> Generator[float, float, float]:
    """Where a parabola through R(θ₀) and the last point reaches the level, three times over."""
    low, high = reach
    distance = min(max(distance, low), high)
    for _ in range(3):
        risen = (yield distance) + rise
        if risen <= 0.0:
            step = 4.0
        elif math.isinf(risen):
            step = 1.0 / 16.0
        else:
            step = min(max(math.sqrt(rise / risen), 1.0 / 64.0), 64.0)
        distance = min(max(distance * step, low), high)
        if 0.8 < step < 1.25:
            break
    return distance


def _refine(
    inner: tuple[float, float], outer: tuple[float, float], rise: float, rtol: float
) -> Generator[float, float, float]:
    """Chandrupatla's method in ln δ on asinh of the excess, which is nearer to a line than the risk itself.

    Inverse quadratic interpolation through the last three points where these allow it, else bisection
    (T. R. Chandrupatla, Advances in Engineering Software 28, 1997). It ends with a bracket of width rtol.
    """

    def bent(excess: float) -> float:
        return math.asinh(min(excess, 1e300) / rise)

    (a, fa), (b, fb) = ((math.log(distance), bent(excess)) for distance, excess in (inner, outer))
    t = 0.5
    while abs(b - a) > rtol and fa != 0.0:
        x = a + t * (b - a)
        f = bent((yield math.exp(x)))
        if (f > 0.0) == (fa > 0.0):
            c, fc = a, fa
        else:
            c, fc, b, fb = b, fb, a, fa
        a, fa = x, f
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        t = 0.5
        if phi * phi < xi and (1.0 - phi) ** 2 < 1.0 - xi:
            t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        edge = min(0.5, 0.5 * rtol / abs(b - a)) if b != a else 0.5
        t = min(max(t, edge), 1.0 - edge)
    return math.exp(a if abs(fa) < abs(fb) else b)
