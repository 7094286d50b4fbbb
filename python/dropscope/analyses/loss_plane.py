"""The risk on a plane: two filter-normalised random directions, or the plane through three solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropscope.analyses.displaced_risks import DisplacedRisks
from dropscope.analyses.loss_line import Normalise, Solution, random_directions, towards
from dropscope.analyses.saving import Result
from dropscope.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LossPlane(Result):
    """Risk on a plane through the current parameters.

    Attributes:
        alphas, betas: float64 coordinates.
        losses: R(θ + αd + βe), float64 (alphas, betas).
        normalise: how random directions were scaled.
        between: whether the plane goes through three solutions, at (0, 0), (1, 0) and (0, 1).
    """

    alphas: Tensor
    betas: Tensor
    losses: Tensor
    normalise: str
    between: bool

    def plot(self) -> Figure:
        """Return a figure: contours of the risk."""
        from dropscope import plots_losses

        return plots_losses.loss_plane(self)

    def __repr__(self) -> str:
        shape = " x ".join(str(length) for length in self.losses.shape)
        return f"LossPlane({shape}, risk {float(self.losses.min()):.3g} to {float(self.losses.max()):.3g})"


def loss_plane(
    problem: Problem,
    *,
    between: tuple[Solution, Solution] | None = None,
    alphas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    normalise: Normalise = "filter",
    vectors: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LossPlane:
    """Risk, dropout off, on a plane through the parameters θ (Li et al., arXiv:1712.09913).

    Args:
        problem: the risk; its parameters are left as they are.
        between: two other solutions θ', θ'': the plane θ + α(θ' − θ) + β(θ'' − θ); default two random directions.
        alphas: default 21 points in [−1, 1], or [−0.5, 1.5] between solutions.
        betas: default the alphas.
        normalise: of random directions, as in :func:`loss_line`.
        vectors: as there.
        seed: as there.
        progress: show a bar.

    Raises:
        TypeError: if problem is not a Problem, or a solution is of another kind.
        ValueError: if shapes do not fit or a number is out of range.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"loss_plane: problem must be a Problem, got {type(problem).__name__}")
    if alphas is None:
        alphas = [i / 10 for i in (range(-10, 11) if between is None else range(-5, 16))]  # 0 and 1 exactly
    a = torch.as_tensor([float(x) for x in alphas], dtype=torch.float64)
    b = a if betas is None else torch.as_tensor([float(x) for x in betas], dtype=torch.float64)
    for name, points in (("alphas", a), ("betas", b)):
        if not len(points) or not bool(torch.isfinite(points).all()):
            raise ValueError(f"loss_plane: {name} must be finite numbers, got {points.tolist()}")
    if between is None:
        columns = random_directions(problem, 2, normalise, vectors, seed, "loss_plane")
    else:
        if len(between) != 2:
            raise ValueError(f"loss_plane: between must be two solutions, got {len(between)}")
        columns, normalise = torch.stack([towards(problem, s, "loss_plane") for s in between], 1), "none"
    grid = torch.cartesian_prod(a, b).to(columns)
    losses = DisplacedRisks(problem, columns)(grid.T, progress)
    return LossPlane(a, b, losses.reshape(len(a), len(b)), normalise, between is not None)
