"""The risk along a line: filter-normalised random directions, a direction of one's own, or between two solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dropscope.analyses.displaced_risks import DisplacedRisks
from dropscope.analyses.saving import Result
from dropscope.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Normalise = Literal["filter", "layer", "none"]
Solution = Tensor | Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class LossLine(Result):
    """Risk along lines through the current parameters.

    Attributes:
        alphas: float64 (a,).
        losses: R(θ + αd), or R((1 − α)θ + αθ') between two solutions, float64 (lines, a).
        normalise: how the directions were scaled.
        between: whether the line joins two solutions.
    """

    alphas: Tensor
    losses: Tensor
    normalise: str
    between: bool

    @property
    def barrier(self) -> float:
        """The largest rise above the straight line between the ends α = 0 and 1, at least 0; NaN for other lines."""
        inside = (self.alphas >= 0.0) & (self.alphas <= 1.0)
        a, losses = self.alphas[inside], self.losses[0, inside]
        if not self.between or not len(a) or float(a[0]) != 0.0 or float(a[-1]) != 1.0:
            return float("nan")
        return max(0.0, float((losses - (1.0 - a) * losses[0] - a * losses[-1]).max()))

    def plot(self) -> Figure:
        """Return a figure: risk against α."""
        from dropscope import plots_losses

        return plots_losses.loss_line(self)

    def __repr__(self) -> str:
        kind = "between two solutions" if self.between else f"{len(self.losses)} lines, normalise {self.normalise!r}"
        span = f"{float(self.alphas[0]):g} to {float(self.alphas[-1]):g}"
        return f"LossLine({kind}, alpha {span}, risk {float(self.losses.min()):.3g} to {float(self.losses.max()):.3g})"


def loss_line(
    problem: Problem,
    direction: Tensor | None = None,
    *,
    between: Solution | None = None,
    alphas: Sequence[float] | None = None,
    lines: int = 1,
    normalise: Normalise = "filter",
    vectors: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LossLine:
    """Risk, dropout off, along a line through the parameters θ (Li et al., arXiv:1712.09913; arXiv:2207.05952, §V).

    Without a direction, d ~ N(0, I) with every filter scaled to the length of the network's own,
    d_j ← d_j ‖θ_j‖/‖d_j‖: a filter is a row of a weight ("filter"), or the whole tensor ("layer", as the paper takes
    fully connected networks). Biases and the parameters of normalisation layers, all of them vectors, are left alone.

    Args:
        problem: the risk; its parameters are left as they are.
        direction: flat d, (dim,), to be used as it is, instead of a random one.
        between: another solution θ': flat, by name, or a model of the same kind; then R((1 − α)θ + αθ'). Buffers, such
            as the running statistics of normalisation layers, stay those of the problem's model.
        alphas: where to evaluate; default 41 points in [−1, 1], or [−0.5, 1.5] between solutions.
        lines: number of random directions.
        normalise: ``"filter"``, ``"layer"`` or ``"none"``.
        vectors: whether random directions also move parameters that are vectors, each scaled as one filter.
        seed: of the random directions.
        progress: show a bar.

    Returns:
        The risks. One that overflows is infinite or NaN, not an error.

    Raises:
        TypeError: if problem is not a Problem, or a direction or solution is of another kind.
        ValueError: if shapes do not fit, a number is out of range, or both direction and between are given.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"loss_line: problem must be a Problem, got {type(problem).__name__}")
    if direction is not None and between is not None:
        raise ValueError("loss_line: give a direction or another solution, not both")
    if isinstance(lines, bool) or not isinstance(lines, int) or lines < 1:
        raise ValueError(f"loss_line: lines must be an int >= 1, got {lines!r}")
    if alphas is None:
        alphas = [i / 20 for i in (range(-20, 21) if between is None else range(-10, 31))]  # 0 and 1 exactly
    points = torch.as_tensor([float(a) for a in alphas], dtype=torch.float64)
    if points.ndim != 1 or not len(points) or not bool(torch.isfinite(points).all()):
        raise ValueError(f"loss_line: alphas must be finite numbers, got {list(alphas)}")
    if direction is not None:
        columns, normalise = flat_direction(problem, direction, "loss_line")[:, None], "none"
    elif between is not None:
        columns, normalise = towards(problem, between, "loss_line")[:, None], "none"
    else:
        columns = random_directions(problem, lines, normalise, vectors, seed, "loss_line")
    coefficients = torch.kron(torch.eye(columns.shape[1]), points)
    losses = DisplacedRisks(problem, columns)(coefficients, progress).reshape(columns.shape[1], -1)
    return LossLine(points, losses, normalise, between is not None)


def random_directions(
    problem: Problem, count: int, normalise: Normalise, vectors: bool, seed: int, name: str
) -> Tensor:
    """Return random directions as columns, (dim, count), every filter scaled to that of the parameters."""
    if normalise not in ("filter", "layer", "none"):
        raise ValueError(f"{name}: normalise must be 'filter', 'layer' or 'none', got {normalise!r}")
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for _ in range(count):
        parts = []
        for p in problem.params.values():
            d = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            theta = p.detach().double().cpu()
            if p.ndim < 2 and not vectors:
                d.zero_()
            elif normalise != "none":
                rows = 1 if normalise == "layer" or p.ndim < 2 else len(p)
                own, other = theta.reshape(rows, -1).norm(dim=1), d.reshape(rows, -1).norm(dim=1)
                d = (d.reshape(rows, -1) * (own / other)[:, None]).reshape(p.shape)
            parts.append(d.reshape(-1))
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1).to(problem.device, problem.dtype)


def flat_direction(problem: Problem, direction: Any, name: str) -> Tensor:
    """A direction, checked."""
    if not isinstance(direction, Tensor):
        raise TypeError(f"{name}: direction must be a tensor, got {type(direction).__name__}")
    if direction.shape != (problem.dim,) or not bool(torch.isfinite(direction).all()):
        raise ValueError(f"{name}: direction must be finite of shape ({problem.dim},), got {tuple(direction.shape)}")
    return direction.detach().to(problem.device, problem.dtype)


def towards(problem: Problem, solution: Solution, name: str) -> Tensor:
    """θ' − θ."""
    here = problem.flatten([p.detach() for p in problem.params.values()])
    if isinstance(solution, nn.Module):
        solution = dict(solution.named_parameters())
    if isinstance(solution, Mapping):
        missing = [key for key in problem.params if key not in solution]
        if missing:
            raise ValueError(f"{name}: the other solution must hold every parameter, got none for {missing}")
        there = problem.flatten([solution[key].detach() for key in problem.params])
    elif isinstance(solution, Tensor):
        there = solution.detach()
    else:
        raise TypeError(f"{name}: between must be a tensor, a mapping or a module, got {type(solution).__name__}")
    return flat_direction(problem, there.to(here), name) - here
